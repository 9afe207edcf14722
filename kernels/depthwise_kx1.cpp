#include <cstdint>
#include <cstddef>

enum class Type { f32, f64, f16, bf16 };

// One depthwise (K x 1) convolution: sizes in elements, padding above and to the left
// (what lies below and to the right follows from H_out and W_out).
// x is (N, C, H, W), y (N, C, H_out, W_out), both dense in NHWC order if channels_last, else NCHW; weight (C, K), bias (C), dense.
// x_channels_last: x alone is in NHWC order (float64 forward on CUDA).
struct Problem {
  int64_t N, C, H, W, H_out, W_out, K, stride_h, stride_w, padding_h, padding_w, dilation;
  Type type;
  bool channels_last, x_channels_last;
};

// A call of the CUDA kernels (kernels/depthwise_kx1.cu), on `stream` of the current device. Forward: in is x, out y. Transposed: in is
// grad_output, out grad_input. A null pointer is a tensor that is absent (bias) or not asked for (gradients); weight is null if out is, x if grad_weight is.
struct Call {
  Problem p;
  bool transposed;
  const void *in, *x, *weight, *bias;
  void *out, *grad_weight, *grad_bias;
  void* (*scratch)(size_t bytes, void* context);  // called at most once, for gradients of weight and bias: memory until the stream has passed
  void *context, *stream;
};
const char* launch(const Call&);  // asynchronous; null, what went wrong, or:
inline constexpr char contiguous_is_faster[] = "nothing is done: contiguous copies take less time than these channels_last tensors";

// CPU kernels
void cpu_forward(const Problem&, const void* x, const void* weight, const void* bias, void* y);
void cpu_backward(const Problem&, const void* grad_output, const void* x, const void* weight, void* grad_input, void* grad_weight, void* grad_bias);
// ---- end of the part shared with the .cu ----

// ---- CPU kernels ----
// Both memory orders, all types and strides take one path. A tile is some rows of some columns; a row of it is slots: slot
// q * lanes + l is pixel column q of lane l. Lanes are channels: of an NHWC image the neighbours, of large NCHW planes one alone, of
// narrow or small ones some vectors of them (a transposition). Where rows of slots lie contiguous in the tensors they are used there,
// converted in registers; else they are packed into a dense buffer, so that packing alone knows the layout, and results unpacked.
// Tiles are cut alike whatever the number of threads, and partial sums are added in a fixed order: results are reproducible.
#ifndef __SANITIZE_ADDRESS__  // takes minutes
// The rest is built faster with less, and this without what gains nothing here.
#pragma GCC optimize("O3", "no-tree-pre", "no-tree-vrp", "no-tree-dominator-opts", "no-code-hoisting", "no-tree-slp-vectorize", "no-predictive-commoning")
#endif
#include <sys/mman.h>
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <new>
#include <type_traits>
#include <vector>
#define INLINE __attribute__((always_inline)) inline
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed only to what is inlined

inline namespace cpu {  // not an unnamed one: the parts share instances
struct Half { uint16_t bits; };
struct BFloat16 { uint16_t bits; };
template <class To, class From> INLINE To bit_cast(const From& from) { To to; static_assert(sizeof to == sizeof from); std::memcpy(&to, &from, sizeof to); return to; }

// 16-bit types from and to float, for numbers (U = uint32_t, F = float) and vectors of them; to nearest even.
// The 16 bits are the upper ones of a U; below them, widen expects zeros and narrow leaves anything.
template <class F, class U> INLINE F widen(BFloat16*, const U& h) { return bit_cast<F>(h); }
template <class F, class U> INLINE F widen(Half*, const U& h) {  // subnormals by a subtraction, which rounds nothing
  U m = (h & 0x7fff0000u) >> 3, normal = m + (m >= 0x0f800000u ? m - m + 0x70000000u : m - m + 0x38000000u);
  U subnormal = bit_cast<U>(bit_cast<F>(m + 0x38800000u) - 6.103515625e-5f);
  return bit_cast<F>((m < 0x00800000u ? subnormal : normal) | (h & 0x80000000u));
}
template <class U, class F> INLINE U narrow(BFloat16*, const F& v) {
  U u = bit_cast<U>(v);
  return (u & 0x7fffffffu) > 0x7f800000u ? u - u + 0x7fc00000u : u + 0x7fffu + (u >> 16 & 1u);
}
template <class U, class F> INLINE U narrow(Half*, const F& v) {  // adding 0.5 rounds what becomes subnormal
  U b = bit_cast<U>(v), u = b & 0x7fffffffu, r = (u - 0x38000000u + 0xfffu + (u >> 13 & 1u)) >> 13;
  r = u < 0x38800000u ? bit_cast<U>(bit_cast<F>(u) + 0.5f) - 0x3f000000u : r;
  r = u >= 0x47800000u ? u - u + 0x7c00u : r;
  r = u > 0x7f800000u ? u - u + 0x7e00u : r;
  return r << 16 | (b & 0x80000000u);
}
template <class T> INLINE auto load(T v) {
  if constexpr (sizeof(T) > 2) return v;
  else return widen<float>((T*)0, uint32_t(v.bits) << 16);
}
template <class T, class R> INLINE void store(T* p, R v) {
  if constexpr (sizeof(T) > 2) *p = v;
  else p->bits = narrow<uint32_t>((T*)0, v) >> 16;
}
INLINE int64_t ceil_div(int64_t a, int64_t b) { return a > 0 ? (a + b - 1) / b : -(-a / b); }  // b > 0
INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
INLINE int64_t repeated(int64_t lanes) { return round_up(lanes, 32) + 64; }  // slots for which weights and init are repeated
INLINE int64_t clamp(int64_t v, int64_t lo, int64_t hi) { return std::max(lo, std::min(v, hi)); }

// Pixel column q of lane l of row r of an image lies at r * row + (col + q * step) * px + l * lane.
struct View { int64_t rows, width, col, step, px, row, lane; };
// Rows of slots of images that lie `image` apart; behind each `lanes` slots, `skip` numbers that are none.
// No vector begins behind number `last` of a pixel: there it overlaps the one before, and `lanes` counts some numbers twice.
template <class R> struct Rows {
  R* data;
  int64_t stride, image, lanes = 1, skip = 0, last = lanes, inverse = (int64_t(1) << 32) / lanes + 1;  // slot * lanes < 2^32
  int64_t at(int64_t slot) const {
    if (!skip) return slot;
    const int64_t pixel = slot * inverse >> 32;
    return pixel * (lanes + skip) + std::min(slot - pixel * lanes, last);
  }
};
// Rows [row, row + rows), pixel columns [q, q + nq), and how many of the lanes exist
struct Tile { int64_t row, rows, q, nq, lanes, present; };

// Row m of each image of out = init + the taps k whose row m * S + off + k * D of in exists. Weights, `w_tap` from tap to tap, and init repeat every `period` slots.
template <class E> struct Conv {
  int64_t images;
  Rows<E> out; int64_t out_rows;
  Rows<const E> in; int64_t in_rows, S, off, D, K;
  const E* w; int64_t w_tap; const E* init; int64_t period, slots;
  const void** table;  // of 8 * (K + 1) pointers
  bool windows, next_image, uncached, past_caches;
};
// Sums of tap k, `tap` apart, += rows m of g times those rows m * S + off + k * D of x that exist. Slots share a sum every `period`; those of a last, overlapping vector have their own.
template <class E> struct Correlation {
  decltype(load(E()))* sums; int64_t tap;
  Rows<const E> g; int64_t g_rows;
  Rows<const E> x; int64_t x_rows, S, off, D, K, period, slots;
  const void** table;
};

// The taps [0, n) in numbers that are compiled: f(first, number)
template <int N> using Number = std::integral_constant<int, N>;
template <int MOST, class F> INLINE void each_taps(int64_t n, const F& f) {
  int64_t k = 0;
  if constexpr (MOST >= 7) {
    for (; n - k >= 7; k += 7) f(k, Number<7>());
    if (n - k >= 5) f(k, Number<5>()), k += 5;
  }
  constexpr int few = std::min(MOST, 3);
  for (; n - k >= few; k += few) f(k, Number<few>());
  if constexpr (MOST >= 7)
    if (n - k == 2) f(k, Number<2>()), k += 2;
  for (; k < n; k++) f(k, Number<1>());
}

// Vectors of R, and the loops written with them
#if defined(__x86_64__)
static const bool native_bfloat16 = __builtin_cpu_supports("avx512bf16");
#endif
template <class R, int BYTES, class Word = uint32_t, class Short = uint16_t> struct Vector {
  typedef R V __attribute__((vector_size(BYTES), aligned(sizeof(R)), may_alias));
  typedef std::conditional_t<sizeof(R) == 8, int64_t, int32_t> Int;
  typedef Int I __attribute__((vector_size(BYTES)));
  typedef Word U __attribute__((vector_size(BYTES)));
  typedef Short Shorts __attribute__((vector_size(BYTES)));
  typedef Short Halves __attribute__((vector_size(BYTES / 2), aligned(2), may_alias));
  typedef R Bits __attribute__((vector_size(BYTES), aligned(2), may_alias));  // of any type
  static constexpr int64_t size = BYTES / sizeof(R);
#if defined(__x86_64__)
  static constexpr int most = BYTES == 16 ? 3 : 7;  // less code for old processors
  template <class T> static constexpr bool converts = BYTES > 16 && std::is_same_v<T, Half>;  // the processor does
#else
  static constexpr int most = 7;
  template <class T> static constexpr bool converts = false;
#endif

  // As many numbers of type T as fill a vector: as one vector of R or two, the even and the odd ones; by get and put, of what the processor
  // `converts`, the first and the last ones
  template <class T> static constexpr int vectors = sizeof(T) > 2 ? 1 : 2;
  template <class T> static constexpr int64_t at_once = vectors<T> * size;
  template <class T> static constexpr bool divided = vectors<T> == 2 && !converts<T>;  // by get and put
  static INLINE V convert(const Halves h) { V v; asm("vcvtph2ps %1, %0" : "=v"(v) : "v"(h)); return v; }
  static INLINE Halves convert(const V v) { Halves h; asm("vcvtps2ph $0, %1, %0" : "=v"(h) : "v"(v)); return h; }
  template <class T> static INLINE R load(T number) {
    if constexpr (converts<T>) return convert(Halves{number.bits})[0];
    else return cpu::load(number);
  }
  template <class T> static INLINE void store(T* p, R number) {
    if constexpr (converts<T>) p->bits = convert(V{number})[0];
    else cpu::store(p, number);
  }
  template <class T> static INLINE void split(V* v, const V bits) {  // by value: what a reference is bound to would have to be aligned
    if constexpr (vectors<T> == 1) v[0] = bits;
    else if constexpr (converts<T>) v[0] = convert(__builtin_convertvector((U)bits, Halves)), v[1] = convert(__builtin_convertvector((U)bits >> 16, Halves));
    else v[0] = widen<V>((T*)0, (U)bits << 16), v[1] = widen<V>((T*)0, (U)bits & 0xffff0000u);
  }
  template <class T> static INLINE V join(const V* v) {
#if defined(__x86_64__)
    if constexpr (BYTES > 16 && std::is_same_v<T, BFloat16>)
      if (native_bfloat16) {
        Shorts halves, mixed;  // the even numbers, then the odd ones
#pragma GCC unroll 32
        for (int e = 0; e < 2 * size; e++) mixed[e] = e % 2 * size + e / 2;
        asm("vcvtne2ps2bf16 %1, %2, %0" : "=v"(halves) : "v"(v[0]), "v"(v[1]));
        return (V)shuffle(halves, halves, mixed);
      }
#endif
    if constexpr (vectors<T> == 1) return v[0];
    else if constexpr (converts<T>) return (V)(__builtin_convertvector(convert(v[0]), U) | __builtin_convertvector(convert(v[1]), U) << 16);
    else return (V)(narrow<U>((T*)0, v[0]) >> 16 | (narrow<U>((T*)0, v[1]) & 0xffff0000u));
  }
  template <class T> static INLINE void get(V* v, const T* p) {
    if constexpr (converts<T>) v[0] = get(p), v[1] = get(p + size);
    else split<T>(v, *(const Bits*)p);
  }
  template <class T> static INLINE void put(T* p, const V* v) {
    if constexpr (converts<T>) *(Halves*)p = convert(v[0]), *(Halves*)(p + size) = convert(v[1]);
    else *(Bits*)p = join<T>(v);
  }
  template <class T> static INLINE void put_past_caches(T* p, const V* v) {  // whole lines of them
#if defined(__x86_64__)
    if (reinterpret_cast<uintptr_t>(p) % 64 == 0) {
      if constexpr (converts<T>) for (int h = 0; h < 2; h++) asm("vmovntps %1, %0" : "=m"(*(Halves*)(p + h * size)) : "v"(convert(v[h])));
      else asm("vmovntps %1, %0" : "=m"(*(Bits*)p) : "v"(join<T>(v)));
    } else
#endif
      put(p, v);
  }
#if defined(__x86_64__)
  template <class T> static INLINE void put_some(T* p, const V* v, uint64_t bytes) {  // those whose bit is set
    asm("vmovdqu8 %1, %0%{%2%}" : "+m"(*(Bits*)p) : "v"(join<T>(v)), "Yk"(bytes));
  }
#endif
  template <int A, class T> static INLINE void get(V* v, const T* p) {  // A times as many
#pragma GCC unroll 4
    for (int a = 0; a < A; a++) get(v + a * vectors<T>, p + a * at_once<T>);
  }
  template <class T> static INLINE V get(const T* p) {  // one vector of R
    if constexpr (vectors<T> == 1) return *(const V*)p;
    else if constexpr (converts<T>) return convert(*(const Halves*)p);
    else return widen<V>((T*)0, __builtin_convertvector(*(const Halves*)p, U) << 16);
  }

  template <class A, class From> static INLINE A shuffle(const A& a, const A& b, const From& from) {  // from: of a's elements, then b's
#ifdef __clang__
    constexpr int n = BYTES / sizeof a[0];
    A v;
    for (int e = 0; e < n; e++) v[e] = (from[e] & n ? b : a)[from[e] & (n - 1)];
    return v;
#else
    return __builtin_shuffle(a, b, from);
#endif
  }

  // Small pixels `px` apart: as many as fit a vector and lie within two. No other number is read or, by put, written.
  template <class T> struct Window {
    int64_t pixels;
    uint64_t low, high, all;  // bytes in use of the two vectors and of the one
    alignas(BYTES) std::conditional_t<sizeof(T) == 2, Short, Int> order[at_once<T>] = {};
    static INLINE uint64_t first(int64_t bytes) { return bytes > 0 ? ~uint64_t(0) >> (64 - std::min<int64_t>(bytes, 64)) : 0; }
    INLINE Window(int64_t lanes, int64_t px, int64_t present) : pixels(std::min({at_once<T> / lanes, (2 * at_once<T> - lanes) / px + 1, present})) {
      const int64_t span = ((pixels - 1) * px + lanes) * sizeof(T);
      low = first(span), high = first(span - BYTES), all = first(pixels * lanes * sizeof(T));
      for (int64_t e = 0; e < pixels * lanes; e++) order[e] = e / lanes * px + e % lanes;
    }
#if defined(__x86_64__)
    INLINE void get(V* v, const T* p) const {
      V a, b;
      asm("vmovdqu8 %1, %0%{%2%}%{z%}" : "=v"(a) : "m"(*(const Bits*)p), "Yk"(low));
      asm("vmovdqu8 %1, %0%{%2%}%{z%}" : "=v"(b) : "m"(*(const Bits*)(p + at_once<T>)), "Yk"(high));
      if constexpr (sizeof(T) == 2) a = (V)shuffle((Shorts)a, (Shorts)b, *(const Shorts*)order);
      else a = shuffle(a, b, *(const I*)order);
      if constexpr (converts<T>) {
        Halves last;
        asm("vcvtph2ps %t1, %0" : "=v"(v[0]) : "v"(a));  // of its first half
        asm("vextracti64x4 $1, %1, %0" : "=v"(last) : "v"(a));
        v[1] = convert(last);
      } else split<T>(v, a);
    }
    INLINE void put(T* p, const V* v) const {
      if constexpr (converts<T>) {
        V a[2] = {v[0], v[1]};
        divide(a[0], a[1]);
        put_some(p, a, all);
      } else put_some(p, v, all);
    }
#endif
  };

  // The even numbers and the odd ones of a and b; a and b again
  static INLINE void divide(V& a, V& b) {
    I even;
#pragma GCC unroll 16
    for (int e = 0; e < size; e++) even[e] = 2 * e;
    const V c = a;
    a = shuffle(c, b, even), b = shuffle(c, b, even + 1);
  }
  static INLINE void mix(V& a, V& b) {
    I low;
#pragma GCC unroll 16
    for (int e = 0; e < size; e++) low[e] = e % 2 * size + e / 2;
    const V c = a;
    a = shuffle(c, b, low), b = shuffle(c, b, low + size / 2);
  }

  // a[i][j] <-> a[j][i], by exchanging blocks of half the size, then within the blocks
  template <int S = size / 2> static INLINE void transpose(V* a) {
    I low, high;
#pragma GCC unroll 16
    for (int e = 0; e < size; e++) low[e] = e & S ? e - S + size : e, high[e] = e & S ? e + size : e + S;
#pragma GCC unroll 16
    for (int i = 0; i < size; i++)
      if (!(i & S)) {
        V b = a[i], c = a[i + S];
        a[i] = shuffle(b, c, low), a[i + S] = shuffle(b, c, high);
      }
    if constexpr (S > 1) transpose<S / 2>(a);
  }
  static INLINE void transpose(R* to, int64_t to_row, const R* from, int64_t from_row, int64_t rows) {  // the first rows of `to`
    V a[size];
#pragma GCC unroll 16
    for (int i = 0; i < size; i++) a[i] = *(const V*)(from + i * from_row);
    transpose(a);
#pragma GCC unroll 16
    for (int i = 0; i < size; i++) if (i < rows) *(V*)(to + i * to_row) = a[i];
  }

  // Planes of n numbers, one behind another, that are too small to be transposed where they are: `buffered` vectors of them are, at a time,
  // by permutations where that takes fewer of them. Each `size` of the lanes gives a vector at `to`: its number e is number from[e] of vector which[e] of n at `in`.
  static constexpr int64_t buffered = 64;
  static INLINE void permute(R* to, int64_t to_lane, const R* in, int64_t in_lane, int64_t in_step, int64_t n, const I& which, const I& from, int64_t lanes) {
    for (int64_t l = 0; l < lanes; l += size) {
      V v = {};
      for (int64_t k = 0; k < n; k++) {
        const V a = *(const V*)(in + l * in_lane + k * in_step);
        v = which == Int(k) ? shuffle(a, a, from) : v;
      }
      *(V*)(to + l * to_lane) = v;
    }
  }
  static INLINE I iota() {
    I i;
#pragma GCC unroll 16
    for (int e = 0; e < size; e++) i[e] = e;
    return i;
  }
  template <class T> static INLINE bool tiny(const Tile& t, int64_t n) { return most == 7 && t.lanes % size == 0 && n < at_once<T>; }

  // n contiguous numbers; the last vectors overlap those before. (The asm keeps the compiler from calling memcpy, which is slow here.)
  template <class T> static INLINE void get(R* dst, const T* src, int64_t count) {
    constexpr int64_t step = at_once<T>;
    int64_t i = 0;
    for (; count >= step && i < count; i += step) {
      i = std::min(i, count - step);
      V v[2];
      get(v, src + i);
      if constexpr (divided<T>) mix(v[0], v[1]);
      if constexpr (vectors<T> == 2) *(V*)(dst + i + size) = v[1];
      *(V*)(dst + i) = v[0];
      asm volatile("");
    }
    for (; i < count; i++) { dst[i] = load(src[i]); asm volatile(""); }
  }
  template <class T> static INLINE void put(T* dst, const R* src, int64_t count) {
    constexpr int64_t step = at_once<T>;
    int64_t i = 0;
    for (; count >= step && i < count; i += step) {
      i = std::min(i, count - step);
      V v[2] = {*(const V*)(src + i)};
      if constexpr (vectors<T> == 2) v[1] = *(const V*)(src + i + size);
      if constexpr (divided<T>) divide(v[0], v[1]);
      put(dst + i, v);
      asm volatile("");
    }
#if defined(__x86_64__)
    if constexpr (BYTES == 64)
      if (i < count) {
        V v[2] = {*(const V*)src};
        if constexpr (vectors<T> == 2) v[1] = *(const V*)(src + size), divide(v[0], v[1]);
        return put_some(dst, v, ~uint64_t(0) >> (64 - count * sizeof(T)));
      }
#endif
    for (; i < count; i++) { store(dst + i, src[i]); asm volatile(""); }
  }

  // Every second of 2 count - 1 numbers
  template <class T> static INLINE void get_second(R* dst, const T* src, int64_t count) {
    int64_t i = 0;
    for (; i + size < count; i += size) {
      V v[2];
      split<T>(v, *(const Bits*)(src + 2 * i));
      if constexpr (vectors<T> == 1) v[1] = *(const V*)(src + 2 * i + size), divide(v[0], v[1]);
      *(V*)(dst + i) = v[0];
    }
    for (; i < count; i++) { dst[i] = load(src[2 * i]); asm volatile(""); }
  }
  // and into every second, with `between` among them
  template <class T> static INLINE void put_second(T* dst, const R* src, int64_t count, R between) {
    int64_t i = 0;
    for (; i + size < count; i += size) {
      V v[2] = {*(const V*)(src + i), V{} + between};
      if constexpr (vectors<T> == 1) mix(v[0], v[1]), *(V*)(dst + 2 * i + size) = v[1];
      *(Bits*)(dst + 2 * i) = join<T>(v);
    }
    for (; i < count; i++) { store(dst + 2 * i, src[i]); if (i + 1 < count) store(dst + 2 * i + 1, between); asm volatile(""); }
  }

  // Slots that do not exist are zero.
  template <class T> static INLINE void pack(const View v, const T* src, const Tile t, const Rows<R> to) {
    int64_t px = t.nq == 1 ? v.row : v.step * v.px, n = t.nq * t.lanes, nq = t.nq, rows = t.rows;
    R *dst = to.data, *const dst_end = dst + rows * to.stride;
    src += t.row * v.row + (v.col + t.q * v.step) * v.px;
    const T* const end = src + (rows - 1) * v.row + (nq - 1) * px + t.lanes;
    if (n == to.stride && v.row == nq * px && rows) n *= rows, nq *= rows, rows = 1;  // rows that follow one another are one
    const int64_t run = (v.lane != 1 && t.lanes > 1) || t.present < t.lanes ? 0 : t.lanes == px ? n : t.lanes;  // contiguous numbers
    for (int64_t r = 0; r < rows; r++, src += v.row, dst += to.stride) {
      const T* from = src;
      if (run > (px > 1))
        for (int64_t i = 0; i < n; i += run, from += px) {
          const int64_t room = std::min(end - from, dst_end - dst - i);  // for whole vectors, even into what follows
          if (1 < run && run <= size && size <= room) *(V*)(dst + i) = get(from);
          else get(dst + i, from, run > 4 ? std::max(run, std::min(at_once<T>, room)) : run);
        }
      else if (px == 1 && tiny<T>(t, v.lane)) {
        R planes[(buffered + 1) * size];
        int64_t plane = v.lane, many = buffered / plane * size;
        for (int64_t first = 0; first < t.lanes; first += many) {
          many = std::min(many, t.lanes - first);
          const int64_t present = clamp(t.present - first, 0, many);
          if (present < many) std::fill(planes, planes + many * plane, R(0));
          get(planes, src + first * plane, (present - 1) * plane + nq);
          if (4 * plane <= size)
            for (int64_t q = 0; q < nq; q++) {
              const I at = iota() * Int(plane) + Int(q);
              permute(dst + q * t.lanes + first, 1, planes, plane, size, plane, at / Int(size), at & Int(size - 1), many);
            }
          else
            for (int64_t l = 0; l < many; l += size)
              for (int64_t i = 0, q; i < nq; i += size) q = clamp(i, 0, std::max(nq - size, int64_t(0))), transpose(dst + q * t.lanes + first + l, t.lanes, planes + l * plane + q, plane, nq - q);
        }
      } else if (t.lanes % size == 0 && px == 1 && nq >= at_once<T>)
        for (int64_t first = 0; first < t.lanes; first += size) for (int64_t q = 0; q < nq; q += at_once<T>) {
          q = std::min(q, nq - at_once<T>);  // the last ones again, rather than fewer
          R* to = dst + q * t.lanes + first;
          const T* at = src + first * v.lane + q;
          const int64_t present = t.present - first;
          V a[size];
#pragma GCC unroll 16
          for (int l = 0; l < size; l++) a[l] = l < present ? (V)*(const Bits*)(at + l * v.lane) : V{};
          transpose(a);
          if constexpr (vectors<T> == 1) {
#pragma GCC unroll 16
            for (int l = 0; l < size; l++) *(V*)(to + l * t.lanes) = a[l];
          } else {
#pragma GCC unroll 1
            for (int l = 0; l < size; l++, to += 2 * t.lanes) {
              V pair[2];
              split<T>(pair, a[l]);
              *(V*)to = pair[0], *(V*)(to + t.lanes) = pair[1];
            }
          }
        }
      else if (t.lanes == 1 && px == 2)
        get_second(dst, src, nq);
      else
        for (int64_t l = 0; l < t.lanes; l++)
          for (int64_t q = 0; q < nq; q++) dst[q * t.lanes + l] = l < t.present ? load(src[l * v.lane + q * px]) : R(0);
      for (int64_t i = n; i % size; i++) dst[i] = 0;
    }
  }

  // The reverse
  template <class T> static INLINE void unpack(const View v, T* dst, const Tile t, const Rows<R> from, const R* values) {
    int64_t px = t.nq == 1 ? v.row : v.step * v.px, n = t.nq * t.lanes, nq = t.nq, rows = t.rows;
    const R* src = from.data;
    dst += t.row * v.row + (v.col + t.q * v.step) * v.px;
    if (n == from.stride && v.row == nq * px && rows) n *= rows, nq *= rows, rows = 1;
    const int64_t run = (v.lane != 1 && t.lanes > 1) || t.present < t.lanes ? 0 : t.lanes == px ? n : t.lanes;
    for (int64_t r = 0; r < rows; r++, dst += v.row, src += from.stride) {
      T* to = dst;
      if (run > (px > 1))
        for (int64_t i = 0; i < n; i += run, to += px) put(to, src + i, run);
      else if (v.lane == nq && tiny<T>(t, nq)) {
        R planes[(buffered + 1) * size];
        int64_t many = buffered / nq * size;
        for (int64_t first = 0; first < t.present; first += many) {
          many = std::min(many, t.lanes - first);
          if (4 * nq <= size)
            for (int64_t i = 0; i < nq; i++) {
              const I to = iota() + Int(i * size), lane = to * Int(65536 / nq + 1) >> 16;  // to / nq
              permute(planes + i * size, nq, src + first, 1, t.lanes, nq, to - lane * Int(nq), lane, many);
            }
          else
            for (int64_t l = 0; l < many; l += size)
              for (int64_t i = 0, q; i < nq; i += size) q = clamp(i, 0, std::max(nq - size, int64_t(0))), transpose(planes + l * nq + q, nq, src + q * t.lanes + first + l, t.lanes, size);
          put(dst + first * nq, planes, std::min(many, t.present - first) * nq);
        }
      } else if (t.lanes % size == 0 && px == 1 && nq >= at_once<T>)
        for (int64_t first = 0; first < t.lanes; first += size) for (int64_t q = 0; q < nq; q += at_once<T>) {
          q = std::min(q, nq - at_once<T>);
          const R* from = src + q * t.lanes + first;
          V a[size];
          if constexpr (vectors<T> == 1) {
#pragma GCC unroll 16
            for (int l = 0; l < size; l++) a[l] = *(const V*)(from + l * t.lanes);
          } else {
#pragma GCC unroll 1
            for (int l = 0; l < size; l++, from += 2 * t.lanes) {
              const V pair[2] = {*(const V*)from, *(const V*)(from + t.lanes)};
              a[l] = join<T>(pair);
            }
          }
          transpose(a);
          T* to = dst + first * v.lane + q;
          const int64_t present = t.present - first;
#pragma GCC unroll 16
          for (int l = 0; l < size; l++) if (l < present) __builtin_prefetch(to + l * v.lane + 128 / sizeof(T), 1), *(Bits*)(to + l * v.lane) = a[l];
        }
      else if (t.lanes == 1 && px == 2)
        put_second(dst, src, nq, *values);
      else
        for (int64_t l = 0; l < t.present; l++)
          for (int64_t q = 0; q < nq; q++) store(dst + l * v.lane + q * px, src[q * t.lanes + l]);
    }
  }

  // Output rows are taken 8 at a time and taps up to 7, both so far apart, lcm(S, D) rows of in, that a row of in once loaded meets them all; few rows, that
  // would leave most of the 8 idle, one behind another, tap by tap.
  // `table` holds the rows of in that a block meets, null where there is none; the asm keeps the compiler from unfolding it into dozens of pointers.
  // Where columns of in have gaps, the processor foresees few rows at a time: WIDE takes half as many, of A times as many slots, and prefetches:
  // what the next rows meet if rows are short, else what lies ahead. The second cache can have more lines on their way than the first; 16-bit types
  // gain more by having the line in the first, where rows are long. A vector that lies across two lines has its end prefetched, since a pixel's other
  // vectors seldom begin there; for 16-bit types, where one more prefetch costs little beside the conversion, its beginning, too.
  // While at the first rows of an image, `next_image` has those prefetched that the same rows of the next image meet.
  // Lines of an `uncached` out are prefetched likewise, since stores wait for theirs one after the other.
  // WIDE also serves where rows are few, or meet no row of in that another meets. WINDOWS is WIDE for pixels or rows smaller than a vector, of which a window is taken at a time.
  template <bool WIDE, bool WINDOWS, class E> static INLINE void conv(const Conv<E>& c) {
    const auto [images, out, out_rows, in, in_rows, S, off, D, K, w, w_tap, init, period, slots, table, windows, next_image, uncached, past_caches] = c;
    constexpr int N = (!WIDE && most == 7 && (BYTES == 64 || vectors<E> == 1)) || (WINDOWS && vectors<E> == 1) ? 8 : 4, A = !WIDE || WINDOWS ? 1 : (BYTES == 64 ? 4 : 2) / vectors<E>;  // as many sums as registers hold
    constexpr int H = A * vectors<E>;
    const int64_t px = in.lanes + in.skip;
    const bool long_rows = in.stride * sizeof(E) >= 16384, first_cache = long_rows && sizeof(E) == 2;
    const int64_t ahead = long_rows ? std::max<int64_t>((first_cache ? 512 : 4096) / (px * sizeof(E)), 1) * px : N * S * in.stride;
    const Window<E> window(WINDOWS ? in.lanes : 1, WINDOWS ? px : 1, WINDOWS ? slots / in.lanes : 1);
    const int64_t width = WINDOWS ? window.pixels * in.lanes : at_once<E>, step = A * width;
    const int64_t apart = std::lcm(S, D) / S, jump = out_rows < 2 * apart ? 1 : apart;  // rows of out that share rows of in; that are taken at once
    const int64_t L = out_rows == 1 ? D : jump * S, every = jump < apart && out_rows > 1 ? K + 1 : L / D, wrap = step % period, tail = (slots - step) % period, w_step = every * w_tap, o_step = jump * out.stride, next_out = out.stride * sizeof(E) < 4096 ? N * o_step : 512 / sizeof(E);
    const int64_t met = clamp(off, 0, in_rows), met_end = clamp(off + (K - 1) * D + (N - 1) * L + 1, 0, in_rows);  // by the first N rows of out
    for (int64_t start = 0; start < std::min(jump, out_rows); start++)
      for (int64_t m = start; m < out_rows; m += N * jump) {
        const int64_t count = std::min<int64_t>(N, (out_rows - m + jump - 1) / jump);
        const auto [k0, least, more, classes] = list<N>(table, in, in_rows, m * S + off, L, D, K, every, count);
        for (int64_t n = 0; n < images; n++) for (int64_t i = 0, j = 0; i < slots; i += step) {
          if (i > slots - step) i = slots - step, j = tail;
          const void** rows = table;
          const E* wj = w + k0 * w_tap + j;
          int64_t at[A];
#pragma GCC unroll 4
          for (int a = 0; a < A; a++) at[a] = n * in.image + in.at(i + a * width);
          asm("" : "+r"(rows), "+r"(wj), "+r"(at[0]));
          V sum[N][H];
#pragma GCC unroll 8
          for (int r = 0; r < N; r++) for (int a = 0; a < A; a++) get(sum[r] + a * vectors<E>, init + j + a * at_once<E>);
          for (int64_t c = 0; c < classes; c++, wj += w_tap) {
            const int64_t taps = least + (c < more);
            each_taps<WIDE && !WINDOWS ? 2 : most>(taps, [&](int64_t k, auto number) __attribute__((always_inline)) {
              constexpr int T = number;
              V wk[T][H];
              const E* from = wj + k * w_step;
#pragma GCC unroll 8
              for (int t = 0; t < T; t++, from += w_step) get<A>(wk[t], from);
#pragma GCC unroll 16
              for (int p = 0; p < N + T - 1; p++)
                if (const E* row = (const E*)rows[k + p]) {
                  V v[H];
#pragma GCC unroll 4
                  for (int a = 0; a < A; a++) {
                    const E *const here = row + at[a], *const next = here + ahead, *const end = next + at_once<E> - !WINDOWS;
                    if constexpr (WINDOWS) window.get(v + a * vectors<E>, here);
                    else get(v + a * vectors<E>, here);
                    if (WIDE) first_cache ? __builtin_prefetch(end) : __builtin_prefetch(end, 0, 2);
                    if (WIDE && (WINDOWS || vectors<E> == 2)) first_cache ? __builtin_prefetch(next) : __builtin_prefetch(next, 0, 2);
                  }
#pragma GCC unroll 8
                  for (int t = 0; t < T; t++)
                    if (p - t >= 0 && p - t < N)
                      for (int h = 0; h < H; h++) sum[p - t][h] += wk[t][h] * v[h];
                }
            });
            rows += taps + N - 1;
          }
          const bool room = i + step - width + at_once<E> <= slots;  // for what a vector has behind its pixels: the next one overwrites that
          prefetch<WIDE ? 1 : N>(in, m * S + off + (K - 1) * D + N * L, classes, D, L, at[0]);
          if (next_image && m == 0)
            for (int64_t row = met; row < met_end; row++)
#pragma GCC unroll 4
              for (int a = 0; a < A; a++) __builtin_prefetch(in.data + in.image + row * in.stride + at[a], 0, 2);
#pragma GCC unroll 4
          for (int a = 0; a < A; a++) {
            E* to = out.data + n * out.image + m * out.stride + out.at(i + a * width);
#pragma GCC unroll 8
            for (int r = 0; r < N; r++, to += o_step)
              if (r < count) {
                if (uncached) __builtin_prefetch(to + next_out, 1);
                if constexpr (WINDOWS) room ? put(to, sum[r] + a * vectors<E>) : window.put(to, sum[r] + a * vectors<E>);
                else if (BYTES == 64 && past_caches) put_past_caches(to, sum[r] + a * vectors<E>);
                else put(to, sum[r] + a * vectors<E>);
              }
          }
          if ((j += wrap) >= period) j -= period;
        }
      }
  }
  // The rows that the next N meet first, by the last tap of each class: short ones end before the processor foresees them; long ones crowd one another out of the cache.
  template <int N, class E> static INLINE void prefetch(const Rows<const E>& in, int64_t row, int64_t classes, int64_t D, int64_t L, int64_t at) {
    if (N == 1 || in.stride * sizeof(E) >= 16384) return;
    const E* from = in.data + row * in.stride + at;
    for (int64_t c = 0; c < classes; c++, from -= D * in.stride) {
#pragma GCC unroll 8
      for (int r = 0; r < N; r++) __builtin_prefetch(from + r * L * in.stride, 0, 2);
    }
  }
  // The taps [k0, k1) some of whose rows exist, in classes, k = k0 + c, k0 + c + every, ...; for each, the rows that they and N rows of output meet
  struct Taps { int64_t k0, least, more, classes; };  // c < more: one more than `least`
  template <int N, class E> static INLINE Taps list(const void** table, const Rows<const E>& in, int64_t in_rows, int64_t first, int64_t L, int64_t D, int64_t K, int64_t every, int64_t count) {
    const int64_t k0 = clamp(ceil_div(-first - (count - 1) * L, D), 0, K), k1 = clamp(ceil_div(in_rows - first, D), k0, K), taps = k1 - k0, classes = std::min(every, taps);
    first += k0 * D;
    for (int64_t c = 0; c < classes; c++, first += D)
      for (int64_t p = 0, n = (taps - 1 - c) / every + N, q = first; p < n; p++, q += L) *table++ = q >= 0 && q < in_rows && p <= n - N + count - 1 ? in.data + q * in.stride : nullptr;
    return {k0, taps / every, taps % every, classes};
  }

  template <int N, class E> static INLINE void dots(const Correlation<E>& c, int64_t m, int64_t L) {
    const auto [sums, tap, g, g_rows, x, x_rows, S, off, D, K, period, slots, table] = c;
    constexpr int64_t width = at_once<E>;
    const int64_t every = L / D, step = every * tap, g_step = L / S * g.stride;
    const auto [k0, least, more, classes] = list<N>(table, x, x_rows, m * S + off, L, D, K, every, N);
    for (int64_t i = 0, s = 0; i < slots; i += width) {
      if (i > slots - width) i = slots - width, s = period;
      const void** rows = table;
      R* to = sums + k0 * tap + s;
      int64_t at = x.at(i);
      const E* gi = g.data + m * g.stride + g.at(i);
      asm("" : "+r"(rows), "+r"(to), "+r"(at), "+r"(gi));
      prefetch<N>(x, m * S + off + (K - 1) * D + N * L, classes, D, L, at);
      V gr[N][vectors<E>];
#pragma GCC unroll 8
      for (int r = 0; r < N; r++, gi += g_step) get(gr[r], gi);
      for (int64_t c = 0; c < classes; c++, to += tap) {
        const int64_t taps = least + (c < more);
        each_taps<N == 7 ? most : 3>(taps, [&](int64_t k, auto number) __attribute__((always_inline)) {
          constexpr int T = number;
          V sum[T][vectors<E>];
          R* first = to + k * step;
#pragma GCC unroll 8
          for (int t = 0; t < T; t++)
            for (int h = 0; h < vectors<E>; h++) sum[t][h] = *(const V*)(first + t * step + h * size);
#pragma GCC unroll 16
          for (int p = 0; p < N + T - 1; p++)
            if (const E* row = (const E*)rows[k + p]) {
              V v[vectors<E>];
              get(v, row + at);
#pragma GCC unroll 8
              for (int t = 0; t < T; t++)
                if (p - t >= 0 && p - t < N)
                  for (int h = 0; h < vectors<E>; h++) sum[t][h] += gr[p - t][h] * v[h];
            }
#pragma GCC unroll 8
          for (int t = 0; t < T; t++)
            for (int h = 0; h < vectors<E>; h++) *(V*)(first + t * step + h * size) = sum[t][h];
        });
        rows += taps + N - 1;
      }
      if ((s += width) == period) s = 0;
    }
  }
  template <class E> static INLINE void correlate(const Correlation<E> c) {
    const int64_t L = std::lcm(c.S, c.D), jump = L / c.S;
    for (int64_t start = 0; start < std::min(jump, c.g_rows); start++) {
      int64_t m = start;
      if constexpr (most >= 7)
        for (; m + 6 * jump < c.g_rows; m += 7 * jump) dots<7>(c, m, L);
      for (; m + jump < c.g_rows; m += 2 * jump) dots<2>(c, m, L);
      for (; m < c.g_rows; m += jump) dots<1>(c, m, L);
    }
  }

  template <class T> static INLINE void add(R* sums, const T* from, int64_t count) {
    int64_t i = 0;
    for (; i + at_once<T> <= count; i += at_once<T>) {
      V v[2];
      get(v, from + i);
      if constexpr (divided<T>) mix(v[0], v[1]);
      if constexpr (vectors<T> == 2) *(V*)(sums + i + size) += v[1];
      *(V*)(sums + i) += v[0];
    }
    for (; i < count; i++) sums[i] += load(from[i]);
  }
  static INLINE void flush(double* to, R* from, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] += from[i], from[i] = 0;
  }
};

// The same source compiled for each instruction set, chosen when run
#if defined(__x86_64__)
template <class F> __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))) void avx512(const F& f) { f(Number<64>()); }
template <class F> __attribute__((target("avx2,fma,f16c"))) void avx2(const F& f) { f(Number<32>()); }
static const int vector_bytes = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") ? 64
                       : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") ? 32 : 16;
constexpr bool x86 = true;
template <class E, class F> void simd(int bytes, const F& f) {
  if (bytes == 64) avx512(f);
  else if (sizeof(E) == 2 || bytes == 32) avx2(f);
  else if constexpr (sizeof(E) > 2) f(Number<16>());  // with few registers 16-bit types are packed
}
#else
static const int vector_bytes = 16;
constexpr bool x86 = false;
template <class E, class F> void simd(int, const F& f) { if constexpr (!std::is_same_v<E, Half>) f(Number<16>()); }
#endif
#define SIMD(E, ...) simd<E>(bytes, [&](auto number) __attribute__((always_inline)) { Vector<decltype(load(E())), number.value>::__VA_ARGS__; })
template <class R, class T> void pack(int bytes, const View& v, const T* src, const Tile& t, Rows<R> to) { SIMD(R, pack(v, src, t, to)); }
template <class R, class T> void unpack(int bytes, const View& v, T* dst, const Tile& t, Rows<R> from, const R* values) { SIMD(R, unpack(v, dst, t, from, values)); }
template <class R, class T> void add(int bytes, R* sums, const T* from, int64_t count) { SIMD(R, add(sums, from, count)); }
template <class R> void flush(int bytes, double* to, R* from, int64_t n) { SIMD(R, flush(to, from, n)); }
template <class E> void conv(int bytes, const Conv<E>& c) {
#if defined(__x86_64__)
  if constexpr (sizeof(E) < 8)
    if (c.windows) return avx512([&](auto) __attribute__((always_inline)) { Vector<float, 64>::conv<true, true>(c); });
#endif
  if ((c.in.skip || c.out_rows * std::gcd(c.S, c.D) <= 4 * c.D || std::lcm(c.S, c.D) >= c.K * c.D) && c.slots * int64_t(sizeof(load(E()))) >= 4 * bytes) SIMD(E, template conv<true, false>(c));
  else SIMD(E, template conv<false, false>(c));
}
template <class E> void correlate(int bytes, const Correlation<E>& c) { SIMD(E, correlate(c)); }
// Those of float serve the 16-bit types, too
extern template void conv(int, const Conv<float>&);
extern template void correlate(int, const Correlation<float>&);

// Copies n bytes, whole lines of them past the caches.
INLINE void copy_past_caches(char* to, const char* from, int64_t n) {
  int64_t i = std::min<int64_t>(-reinterpret_cast<uintptr_t>(to) & 63, n);
  std::memcpy(to, from, i);
#if defined(__x86_64__)
  typedef float Quarter __attribute__((vector_size(16), aligned(1), may_alias));
  for (; i + 64 <= n; i += 64)
#pragma GCC unroll 4
    for (int q = 0; q < 64; q += 16) asm("movntps %1, %0" : "=m"(*(Quarter*)(to + i + q)) : "x"(*(const Quarter*)(from + i + q)));
#endif
  std::memcpy(to + i, from + i, n - i);
}

struct Job {
  Problem p;
  const void *in, *weight, *bias, *x;  // in: x forward, grad_output backward; x: for the weight gradient
  void* out;                           // y or grad_input
  bool forward, want_weight, want_bias, direct;  // direct: computed in the tensors, not in buffers;
  bool windows;                        // then: pixels of few channels with gaps between them, or short rows
  bool next_image;                     // of several a tile, that no cache holds, while at one: what the next meets first is prefetched
  bool fresh, uncached;                // an output whose memory the system has yet to clear; that the second cache does not hold;
  bool past_caches, staged;            // that none holds: it is stored past them, where it is made or from a buffer
  View vin, vout, vgrad;               // vgrad: all columns of grad_output
  int64_t lanes, multiple;             // lanes per tile; slots of a pixel are a multiple of this: its last vector overlaps
  int64_t taps;                        // of a channel in weight
  int64_t channels, images;            // as regrouped (narrow planes of few channels)
  int64_t together, sets;              // images per tile, if they are small
  int64_t q_begin, q_end, nq, band;    // columns that meet x; columns per tile, rows of out per tile,
  int64_t cut;                         // a multiple of this many
  int64_t column_tiles, bands, groups, in_rows, slots;
  int64_t first, skip;                 // where a strided tensor is packed with all of its columns: the first in use, and how many behind each are not
  int bytes;                           // per vector
  double* sums;                        // of every task, (K + 1) x lanes: weight gradients, bias gradient
};

// The columns [a, b) that have no slot = values
template <class T> void fill(const View& v, T* dst, const Tile& t, int64_t a, int64_t b, const T* values) {
  int64_t first = v.col + t.q * v.step, last = first + (t.nq - 1) * v.step + 1, rows = t.rows;
  if (t.nq <= 0) first = last = b;
  if (v.step == 1 && first <= a && last >= b) return;
  const bool dense = v.lane == 1 || t.lanes == 1, whole = dense && t.present == v.px;  // the lanes of a pixel lie side by side; they are all of its numbers
  // All columns where a few in a place would cost more; results come later
  if (whole && (v.step == 1 ? v.row * sizeof(T) <= 2048 : v.step > 2 && v.px == 1)) first = last = b;
  if (first == b && a == 0 && b == v.width) b = first = last = rows * b, rows = 1;  // rows that follow one another are one
  for (int64_t r = t.row; r < t.row + rows; r++)
    for (int64_t c = a, slot = first, n; c < b; c += n) {
      n = 1;
      if (c == slot && c < last) {
        slot += v.step;
        if (v.step > 1 && !(v.step == 2 && v.px == 1 && t.lanes == 1)) continue;
        if ((c = last) >= b) break;
      }
      T* to = dst + r * v.row + c * v.px;
      if (dense) {
        if (whole) n = (c < first ? first : c < last ? slot : b) - c;
        const int64_t pixels = std::min(n, repeated(t.lanes) / t.lanes);
        for (int64_t i = 0; i < n; i += pixels) i = std::min(i, n - pixels), std::memcpy(to + i * v.px, values, pixels * t.present * sizeof(T));
      }
      else for (int64_t l = 0; l < t.present; l++) to[l * v.lane] = values[l];
    }
}

template <class T> void tasks(const Job& j, int64_t begin, int64_t end) {
  using R = decltype(load(T()));
  const Problem& p = j.p;
  const int64_t K = p.K, S = p.stride_h, D = p.dilation, pad = p.padding_h, vector = j.bytes / (j.direct ? sizeof(T) : sizeof(R)), ns = j.slots;  // vector: slots that are computed at once
  const int64_t bands = j.bands, units = j.sets * bands * j.column_tiles, w_tap = repeated(j.lanes);
  const int64_t full = round_up(ns, vector), tap = (p.channels_last ? full : std::min(full, std::max<int64_t>(j.lanes, 64))) + vector;
  auto place = [&](int64_t s) { return j.direct && std::is_same_v<T, BFloat16> ? (s & -vector) + (s & 1) * (vector / 2) + (s & (vector - 1)) / 2 : s; };  // of slot s, the even ones before the odd
  const int64_t room_in = j.in_rows * ns, room_out = j.band * ns;  // of an image's tile, packed
  const int64_t room_staged = j.staged ? j.together * j.band * j.vout.row : 0;
  const int64_t size = (K + 2) * w_tap + K * tap + ns + (j.direct ? ns : j.together * (room_in + 2 * room_out) + 16 * j.lanes /* which the last transposition reads too much */) + room_staged;
  struct Scratch { R* data; ~Scratch() { std::free(data); } } scratch{(R*)std::aligned_alloc(64, (size * sizeof(R) + 127) / 64 * 64)};
  if (!scratch.data) throw std::bad_alloc();
  R *weights = scratch.data, *sums = weights + (K + 2) * w_tap, *bias_sums = sums + K * tap, *buffer_in = bias_sums + ns, *buffer_out = buffer_in + j.together * room_in, *buffer_x = buffer_out + j.together * room_out, *stage = weights + size - room_staged;
  T* const values = (T*)(weights + (K + 1) * w_tap);  // of a pixel of out that meets no x
  const bool whole_in = j.skip && j.forward, whole_out = j.skip && !j.forward;
  std::vector<const void*> table(8 * (K + 1));
  std::vector<double> totals(j.sums ? K * tap + ns : 0);
  for (int64_t t = begin, built = -1; t < end; t++) {
    int64_t c0 = t / j.groups * j.lanes, group = t % j.groups, lanes = std::min(j.lanes, p.channels_last ? j.channels - c0 : round_up(j.channels - c0, vector));
    const int64_t padded = round_up(lanes, j.multiple);
    auto packed_row = [&](int64_t columns) { return round_up(columns * lanes, vector); };
    auto build = [&](auto* to, int64_t k, int64_t width) {
      for (int64_t i = 0, c = c0; i < width; i++, c = c + 1 < p.C ? c + 1 : 0) {
        if (width > lanes && i == width - vector) c = c0 + lanes - vector;
        const T value = k < K ? ((const T*)j.weight)[c * j.taps + k] : j.bias ? ((const T*)j.bias)[c] : T{};
        if constexpr (std::is_same_v<decltype(to), T*>) to[i] = value;
        else to[i] = load(value);
      }
      const auto number = *to;  // a copy, which filling cannot change
      if (width == 1) std::fill(to, to + w_tap, number);
      else for (int64_t i = width, n; i < w_tap; i += n) n = std::min(i, w_tap - i), std::copy(to, to + n, to + i);
    };
    if (c0 != built) {
      if (whole_out) std::fill(buffer_out, buffer_x, R(0));
      build(values, K, lanes);
      for (int64_t k = j.weight ? 0 : K; k <= K; k++) j.direct ? build((T*)weights + k * w_tap, k, padded) : build(weights + k * w_tap, k, lanes);
    }
    built = c0;
    if (j.sums) std::fill(sums, sums + K * tap + ns, R(0));
    double* total = j.sums ? j.sums + t * (K + 1) * j.lanes : nullptr;
    const int64_t common = std::lcm(padded, vector), period = std::min(common * std::max<int64_t>(1, 64 / common), full);  // few sums, but no two vectors in a row for the same
    const bool ends = j.want_weight && j.direct && padded % vector;
    int64_t summed = 0, last = -1;
    auto flush_all = [&] {  // before sums grow so long that float loses digits
      for (int64_t k = 0; k < K; k++) flush(j.bytes, totals.data() + k * tap, sums + k * tap, period + vector);
      summed = 0;
    };
    auto reduce = [&](int64_t length) {  // of rows so long
      flush_all();
      for (int64_t k = 0; k < K; k++) {
        for (int64_t l = 0; l < lanes; l++) {
          double sum = 0;
          for (int64_t s = l < padded - vector ? l : l + padded - lanes; s < period; s += padded) sum += totals[k * tap + place(s)];
          total[k * j.lanes + l] += sum;
        }
        for (int64_t s = length - length % vector; s < length; s++) total[k * j.lanes + s % lanes] += totals[k * tap + period + place(s - (length - vector))];
      }
      std::fill(totals.begin(), totals.begin() + K * tap, 0.0);
    };
    for (int64_t u = units * group / j.groups, u1 = units * (group + 1) / j.groups; u < u1; u++) {
      // an image's tiles one after another, but where their rows' ends are summed apart and need to be alike
      const int64_t ct = ends ? u / bands / j.sets : u / bands % j.column_tiles, b = u % bands, n0 = (ends ? u / bands % j.sets : u / bands / j.column_tiles) * j.together;
      const int64_t images = std::min(j.together, j.images - n0), Q = j.q_end - j.q_begin;
      auto edge = [&](int64_t b) { return std::min(ceil_div(j.vout.rows, j.cut) * b / bands * j.cut, j.vout.rows); };
      int64_t o0 = edge(b), o1 = edge(b + 1);
      int64_t q0 = j.q_begin + Q * ct / j.column_tiles, nq = j.q_begin + Q * (ct + 1) / j.column_tiles - q0;
      auto present = [&](int64_t n) { return p.channels_last ? lanes : std::min({lanes, j.channels - c0, p.N * p.C - (n * j.channels + c0)}); };
      auto apart = [&](const View& v) { return (p.channels_last ? 1 : j.channels) * v.rows * v.row; };
      auto image = [&](const View& v, int64_t n) { return n * apart(v) + c0 * v.lane; };
      const View &vi = j.vin, &vo = j.vout;
      const int64_t slots = j.direct ? nq * padded : packed_row(nq);
      // the rows of in that out rows [o0, o1) meet
      int64_t i0 = j.forward ? o0 * S - pad : ceil_div(o0 + pad - (K - 1) * D, S);
      int64_t i1 = j.forward ? (o1 - 1) * S - pad + (K - 1) * D + 1 : ceil_div(o1 + pad, S);
      i0 = clamp(i0, 0, vi.rows), i1 = clamp(i1, i0, vi.rows);
      auto tin = [&](int64_t n) { return Tile{i0, i1 - i0, whole_in ? 0 : q0, whole_in ? vi.width : nq, lanes, present(n)}; };
      auto tout = [&](int64_t n) { return Tile{o0, o1 - o0, whole_out ? 0 : q0, whole_out ? vo.width : nq, lanes, present(n)}; };
      const int64_t tile_out = (o1 - o0) * vo.row;  // numbers of an image's, if all columns are its
      // Where row o0 of an image of out belongs, and where it is made
      auto result = [&](int64_t n) { return j.out ? (T*)j.out + image(vo, n) + o0 * vo.row : nullptr; };
      auto made = [&](int64_t n) { return j.staged ? (T*)stage + (n - n0) * tile_out : result(n); };
      for (int64_t n = n0; n < n0 + images && j.out; n++)
        fill(vo, made(n) - o0 * vo.row, tout(n), ct ? vo.col + q0 * vo.step : 0, ct + 1 < j.column_tiles ? vo.col + (q0 + nq) * vo.step : vo.width, values);
      auto compute = [&](auto out, auto in, auto x, auto* weights) {
        using E = std::remove_pointer_t<decltype(weights)>;
        const auto* init = weights + K * w_tap;
        if (j.out && j.forward) conv(j.bytes, Conv<E>{images, out, o1 - o0, in, i1 - i0, S, o0 * S - pad - i0, D, K, weights, w_tap, init, padded, slots, table.data(), j.windows, j.next_image, j.uncached, j.past_caches});
        if (j.out && !j.forward) for (int64_t i = o0; i < std::min(o0 + S, o1); i++) {
          // Rows i, i + S, ... of grad_input meet only the taps k, k + every, ...; the last of them meets the first row of grad_output.
          int64_t k = 0, every = S / std::gcd(S, D);
          while (k < every && (i + pad - k * D) % S) k++;
          int64_t taps = k < every && k < K ? (K - 1 - k) / every + 1 : 0, d = every * D / S;
          auto rows = out;
          rows.data += (i - o0) * out.stride, rows.stride *= S;
          conv(j.bytes, Conv<E>{images, rows, (o1 - i + S - 1) / S, in, i1 - i0, 1, (i + pad - k * D) / S - (taps - 1) * d - i0, d, taps,
               weights + (k + (taps - 1) * every) * w_tap, -every * w_tap, init, padded, slots, table.data(), false, j.next_image, j.uncached, j.past_caches});
        }
        if (j.want_weight) {
          if (ends && last >= 0 && last != slots) reduce(last);
          last = slots;
          int64_t adds = (slots + period - 1) / period, step = std::max<int64_t>(7, 128 / adds / 7 * 7);
          for (int64_t n = 0; n < images; n++, x.data += x.image, in.data += in.image) for (int64_t h = i0, rows; h < i1; h += rows) {
            rows = std::min(step, i1 - h);
            auto g = in;
            g.data += (h - i0) * in.stride;
            if (summed && (summed + rows) * adds > 128) flush_all();
            correlate(j.bytes, Correlation<E>{sums, tap, g, rows, x, o1 - o0, S, h * S - pad - o0, D, K, period, slots, table.data()});
            summed += rows;
          }
        }
      };
      auto rows_from = [&](const View& v, auto* first, int64_t apart) {
        return Rows<std::remove_pointer_t<decltype(first)>>{first ? first + (v.col + q0 * v.step) * v.px : first, v.row, apart, padded, v.step * v.px - padded, lanes - j.multiple};
      };
      auto in_place = [&](const View& v, const void* from, int64_t row) { return rows_from(v, from ? (const T*)from + image(v, n0) + row * v.row : nullptr, apart(v)); };
      auto in_buffer = [&](auto* buffer, const View& v, int64_t room, bool whole) {
        using E = std::remove_pointer_t<decltype(buffer)>;
        return whole ? Rows<E>{buffer + j.first * lanes, packed_row(v.width), room, lanes, j.skip * lanes} : Rows<E>{buffer, packed_row(nq), room};
      };
      auto packed = [&](const View& v, const void* from, auto tile, R* buffer, int64_t room, bool whole) {
        for (int64_t n = 0; n < images && from; n++) pack(j.bytes, v, (const T*)from + image(v, n0 + n), tile(n0 + n), Rows<R>{buffer + n * room, packed_row(tile(n0 + n).nq)});
        return in_buffer((const R*)buffer, v, room, whole);
      };
      if (j.direct && nq > 0) compute(rows_from(vo, made(n0), j.staged ? tile_out : apart(vo)), in_place(vi, j.in, i0), in_place(vo, j.x, o0), (T*)weights);
      if (!j.direct && nq > 0) {
        compute(in_buffer(buffer_out, vo, room_out, whole_out),
                packed(vi, j.out || j.want_weight ? j.in : nullptr, tin, buffer_in, room_in, whole_in), packed(vo, j.want_weight ? j.x : nullptr, tout, buffer_x, room_out, whole_out), weights);
        for (int64_t n = 0; n < images && j.out; n++) unpack(j.bytes, vo, made(n0 + n) - o0 * vo.row, tout(n0 + n), Rows<R>{buffer_out + n * room_out, packed_row(tout(n0 + n).nq)}, weights + K * w_tap);
      }
      for (int64_t n = n0; n < n0 + images && j.staged; n++) copy_past_caches((char*)result(n), (const char*)made(n), tile_out * sizeof(T));
      if (j.want_bias) {  // its own share of all of grad_output, columns and rows that meet no x included
        int64_t w0 = p.W_out * ct / j.column_tiles, w1 = p.W_out * (ct + 1) / j.column_tiles;
        for (int64_t n = n0, added = 0; n < n0 + images; n++) for (int64_t h = p.H_out * b / bands, h1 = p.H_out * (b + 1) / bands, rows; h < h1; h += rows) {
          const bool dense = lanes == j.vgrad.px;  // is added where it is, else packed
          const T* const from = (const T*)j.in + image(j.vgrad, n);
          rows = dense || j.direct ? 1 : std::min(j.in_rows, h1 - h);
          for (int64_t w = w0, m; w < w1; w += m) {
            m = std::min(j.nq, w1 - w);
            if (!dense) pack(j.bytes, j.vgrad, from, Tile{h, rows, w, m, lanes, present(n)}, Rows<R>{buffer_in, packed_row(m)});
            for (int64_t r = 0; r < rows; r++) {
              if (++added % 64 == 0) flush(j.bytes, totals.data() + K * tap, bias_sums, ns);
              if (dense) add(j.bytes, bias_sums, from + h * j.vgrad.row + w * j.vgrad.px, m * lanes);
              else add(j.bytes, bias_sums, buffer_in + r * packed_row(m), m * lanes);
            }
          }
        }
        flush(j.bytes, totals.data() + K * tap, bias_sums, ns);
      }
    }
    if (!j.sums) continue;
    if (last >= 0) reduce(last);
    for (int64_t s = 0; s < j.nq * lanes; s += lanes)
      for (int64_t l = 0; l < lanes; l++) total[K * j.lanes + l] += totals[K * tap + s + l];
    std::fill(totals.begin(), totals.end(), 0.0);
  }
#if defined(__x86_64__)
  if (j.past_caches || j.staged) asm volatile("sfence" ::: "memory");  // such stores are not ordered with those that tell of the task's end
#endif
}

void float16_tasks(const Job&, int64_t begin, int64_t end);
void bfloat16_tasks(const Job&, int64_t begin, int64_t end);
}  // namespace cpu
// ---- end of what is compiled with each of the next two parts ----

extern "C" int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain, void (*)(int64_t, int64_t, void*), void*);  // of torch/csrc/stable/c/shim.h
template void conv(int, const Conv<float>&);
template void correlate(int, const Correlation<float>&);

namespace {
template <class F> void parallel(int64_t n, int64_t grain, const F& f) {  // torch's own threads: an OpenMP of ours would not be governed by torch
  if (torch_parallel_for(0, n, grain, [](int64_t b, int64_t e, void* c) { (*(const F*)c)(b, e); }, (void*)&f))
    throw std::bad_alloc();  // all that fails in a task
}

// Cuts the work into tiles that stay in cache and tasks of some 32 Ki elements, and runs it.
void run(Job j, void* grad_weight, void* grad_bias) {
  Problem& p = j.p;
  if (p.H * p.W == 1 && p.H_out * p.W_out == 1) p.channels_last = true;  // the orders are the same; this one is faster
  if (p.W == 1 && p.W_out == 1) p.stride_w = 1;
  if (p.H_out == 1) p.stride_h = 1;
  const int64_t element = p.type == Type::f64 ? 8 : p.type == Type::f32 ? 4 : 2;
  j.taps = p.K;
  // Taps that meet no row are left out.
  const int64_t first_tap = clamp(ceil_div(p.padding_h - (p.H_out - 1) * p.stride_h, p.dilation), 0, p.K - 1);
  p.K = clamp((p.H - 1 + p.padding_h) / p.dilation + 1, first_tap + 1, p.K) - first_tap, p.padding_h -= first_tap * p.dilation;
  if (p.K == 1) p.dilation = 1;
  if (j.weight) j.weight = (const char*)j.weight + first_tap * element;
  if (grad_weight && p.K < j.taps) std::memset(grad_weight, 0, p.C * j.taps * element);
  if (p.channels_last && p.H == 1 && p.H_out == 1 && p.padding_w == 0 && p.W % p.stride_w == 0 && p.W * p.C * element < 64)  // images of one short row are one long row
    p.W *= p.N, p.W_out *= p.N, p.N = p.stride_h = 1;
  if (p.channels_last && p.K == 1 && p.stride_h == 1 && p.padding_h == 0 && p.H == p.H_out)  // images under one another are one high image,
    p.H *= p.N, p.H_out *= p.N, p.N = 1;
  if (p.channels_last && p.H_out == 1 && p.N >= 8 && p.padding_h <= 0 && -p.padding_h < p.H)  // whose rows of out, one of each, lie a stride of the images' height apart
    p.stride_h = p.H, p.H *= p.N, p.H_out = p.N, p.N = 1;
  const int64_t vector = vector_bytes / (p.type == Type::f64 ? 8 : 4), grain = 32768, budget = grain << p.channels_last, halo_all = (p.K - 1) * p.dilation;
  auto view = [&](int64_t rows, int64_t width, int64_t col, int64_t step) {
    return p.channels_last ? View{rows, width, col, step, p.C, width * p.C, 1} : View{rows, width, col, step, 1, width, rows * width};
  };
  View vx = view(p.H, p.W, -p.padding_w, p.stride_w);
  j.vgrad = view(p.H_out, p.W_out, 0, 1);
  j.vin = j.forward ? vx : j.vgrad, j.vout = j.forward ? j.vgrad : vx;
  j.q_begin = std::min(ceil_div(p.padding_w, p.stride_w), p.W_out);
  j.q_end = clamp(ceil_div(p.W + p.padding_w, p.stride_w), j.q_begin, p.W_out);
  const int64_t Q = std::max<int64_t>(j.q_end - j.q_begin, 1);
  // as many columns as leave room for three times the rows that a tile shares with its neighbour
  const int64_t halo = std::min(halo_all, j.vin.rows), wanted = clamp(budget / std::max(3 * halo + 16, p.K), 64, 1024);
  const bool small = p.stride_w <= 8 && Q <= wanted / vector && p.H * p.W < (j.forward && p.stride_h * p.stride_w == 1 ? 256 : 1024);  // planes, better taken many at a time
  const bool narrow = !p.channels_last && (Q < vector || small);
  // as many channels; of narrow planes no more than it takes to pack them well, or than leave tasks enough if taps are many
  const int64_t widest = narrow ? std::max(std::min({8192 / (p.H * p.W), wanted / Q, 4096 / (p.K + 1)}) / vector, int64_t(1)) * vector : wanted;
  j.channels = narrow ? p.C * clamp(widest / p.C, 1, p.N) : p.C;
  const int64_t lanes = round_up(ceil_div(j.channels, ceil_div(j.channels, widest)), vector);
  j.lanes = p.channels_last ? std::min(p.C, lanes) : narrow ? lanes : 1;
  j.images = (p.N * p.C + j.channels - 1) / j.channels;
  j.nq = std::min(Q, std::max<int64_t>(1, wanted / j.lanes));
  const int64_t blocks = ceil_div(j.channels, j.lanes);
  const bool gaps = p.channels_last && (p.stride_w > 1 || j.lanes < p.C);
  const int64_t run = gaps ? j.lanes : Q / ceil_div(Q, j.nq) * j.lanes;  // contiguous numbers in a row of a tile
  const int bytes = !narrow && element * run < vector_bytes ? std::max(vector_bytes / 2, 16) : vector_bytes;
  const int64_t at_once = bytes / element;
  const int64_t met = std::min(p.K, j.vin.rows);  // rows at once: too many in the same place of a cache are packed
  const bool spread = met * std::gcd(j.vin.row * element, int64_t(65536)) <= 32 * 65536;
  j.windows = vector_bytes == 64 && j.forward && p.channels_last && (gaps || (element * run < 64 && (element == 2 || p.padding_w > 0))) && spread &&
              element * j.lanes < 64 && (p.stride_w > 1 ? std::min(p.K, ceil_div(p.H, p.dilation)) : p.K) < (p.type == Type::f16 ? 9 : p.type == Type::bf16 ? 24 : 32) && p.type != Type::f64;
  j.direct = j.windows || ((element > 2 || bytes > 16 || (p.type == Type::bf16 && !x86)) && !narrow && run >= at_once && (p.channels_last ? spread : met <= 12 || j.vin.row <= 512) &&
                           (gaps ? (p.C - 1) % j.lanes + 1 >= at_once && (!j.forward || p.K < 4 || bytes == vector_bytes) : p.stride_w == 1));
  j.multiple = j.direct && gaps && !j.windows ? at_once : 1;
  j.bytes = j.windows || (!j.direct && p.channels_last && 4 * j.nq * j.lanes >= vector_bytes) ? vector_bytes : bytes;
  if (j.direct && j.forward) j.nq = std::min(Q, (p.K > 1 ? 8 : 32) * wanted / j.lanes);  // whole rows of one tap: none is met again, and threads that share one take each other's lines
  else if (j.forward && p.channels_last) j.nq = std::min(Q, std::max(j.nq, budget / 2 / (j.vin.rows + j.vout.rows) / j.lanes));
  else if (j.direct && Q * j.lanes <= 4 * wanted) j.nq = Q;  // whole rows follow one another in memory
  if (narrow && p.stride_w > 1 && p.stride_w <= 8 && j.nq == j.q_end - j.q_begin) {
    View& v = j.forward ? j.vin : j.vout;
    j.first = v.col + j.q_begin * v.step, j.skip = v.step - 1;
    v.col = 0, v.step = 1;
  }
  j.slots = round_up((j.skip ? p.W : j.nq) * round_up(j.lanes, j.multiple), vector);
  const int64_t block = 8 * std::lcm(p.stride_h, p.dilation) / (j.forward ? p.stride_h : 1);  // rows that conv takes at once
  j.band = std::min(j.vout.rows, std::max(clamp(block, 16, 256), (budget / j.slots - halo) / (j.forward ? p.stride_h : 1)));
  j.cut = j.band < j.vout.rows && j.band >= block ? block : 1, j.band -= j.band % j.cut;
  j.in_rows = std::min(j.vin.rows, j.forward ? (j.band - 1) * p.stride_h + halo_all + 1 : (j.band + halo_all) / p.stride_h + 2);
  j.column_tiles = (Q + j.nq - 1) / j.nq, j.bands = (j.vout.rows + j.band - 1) / j.band;
  j.together = j.bands * j.column_tiles > 1 ? 1 : clamp(budget / ((j.in_rows + j.band) * j.slots), 1, j.images);
  j.sets = ceil_div(j.images, j.together);
  // An output that no cache holds beside what it is made of is stored past them: pixels or rows of whole lines where they are made; others, whose lines
  // would come back from memory for their ends, from a buffer, where that gains: not those of 16-bit types, computed in place, or of small NHWC images. Not fresh memory, which the system clears through the caches when it is first written.
  const auto bytes_of = [&](const View& v) { return p.N * p.C * v.rows * v.width * element; };
  const int64_t output = bytes_of(j.vout);
  const bool large = x86 && !j.fresh && bytes_of(j.vin) + (j.want_weight ? 2 : 1) * output >= 64 << 20, whole_lines = (gaps ? j.lanes | p.C : j.vout.row) * element % 64 == 0;
  j.staged = large && j.out && j.nq == Q && (j.direct ? !gaps && !j.windows && element > 2 && (!p.channels_last || j.vout.rows * j.vout.row * element >= 4096) && !(whole_lines && (vector_bytes == 64 || p.channels_last)) : j.lanes == 1);
  j.past_caches = large && j.direct && whole_lines && vector_bytes == 64 && !j.staged;
  j.uncached = j.direct && !j.past_caches && !j.staged && output >= 4 << 20;
  j.next_image = j.direct && j.together > 1 && bytes_of(j.vin) >= 4 << 20;
  const int64_t units = j.sets * j.bands * j.column_tiles;
  const int64_t total = p.N * p.C * std::max(p.H * p.W, p.H_out * p.W_out);
  // A task sets up and adds up sums of its own: it takes at least 8 numbers for each, or 2 if else there were not even 4 tasks.
  auto groups = [&](int64_t least) { return total / blocks / std::max({grain, total / 256, least * (p.K + 1) * (j.forward ? j.lanes : std::max(j.slots, 4 * j.lanes))}); };
  j.groups = clamp(std::max(groups(8), std::min(ceil_div(4, blocks), groups(2))), 1, units);
  const int64_t count = blocks * j.groups;
  std::vector<double> sums;
  if (j.want_weight || j.want_bias) sums.resize(count * (p.K + 1) * j.lanes);
  j.sums = sums.data();
  parallel(count, std::max<int64_t>(1, grain / (total / count + 1)), [&](int64_t b, int64_t e) {
    (p.type == Type::f32 ? tasks<float> : p.type == Type::f64 ? tasks<double> : p.type == Type::f16 ? float16_tasks : bfloat16_tasks)(j, b, e);
  });
  if (sums.empty()) return;
  parallel(p.C, std::max<int64_t>(1, grain / (j.groups * (p.K + 1))), [&](int64_t b, int64_t e) {
    std::vector<double> s(e - b);
    for (int64_t k = 0; k <= p.K; k++) {
      void* to = k < p.K ? grad_weight : grad_bias;
      if (!to) continue;
      std::fill(s.begin(), s.end(), 0.0);
      for (int64_t copy = 0; copy < j.channels; copy += p.C)
        for (int64_t c = b, n; c < e; c += n) {
          const int64_t v = copy + c, l = v % j.lanes;
          n = std::min(e - c, j.lanes - l);
          for (int64_t g = 0; g < j.groups; g++) {
            const double* from = &sums[((v / j.lanes * j.groups + g) * (p.K + 1) + k) * j.lanes + l];
            for (int64_t i = 0; i < n; i++) s[c - b + i] += from[i];
          }
        }
      for (int64_t c = b; c < e; c++) {
        const int64_t i = k < p.K ? c * j.taps + first_tap + k : c;
        if (p.type == Type::f64) store((double*)to + i, s[c - b]);
        else if (p.type == Type::f32) store((float*)to + i, float(s[c - b]));
        else if (p.type == Type::f16) store((Half*)to + i, float(s[c - b]));
        else store((BFloat16*)to + i, float(s[c - b]));
      }
    }
  });
}

// Fresh memory costs more in page faults than the convolution does: ask for large pages for large outputs.
// True if such a one is fresh.
bool use_large_pages(void* at, const Problem& p, int64_t rows, int64_t width) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t page = 2 << 20;
  const uintptr_t first = (reinterpret_cast<uintptr_t>(at) + page - 1) / page * page;
  const uintptr_t last = (reinterpret_cast<uintptr_t>(at) + p.N * p.C * rows * width * (p.type == Type::f64 ? 8 : p.type == Type::f32 ? 4 : 2)) / page * page;
  unsigned char resident = 1;
  if (at && last >= first + 4 * page) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE), mincore(reinterpret_cast<void*>(last - page), 1, &resident);
  return !(resident & 1);
#else
  return false;
#endif
}
}  // namespace

void cpu_forward(const Problem& p, const void* x, const void* weight, const void* bias, void* y) {
  Job j{};
  j.fresh = use_large_pages(y, p, p.H_out, p.W_out);
  j.p = p, j.forward = true, j.in = x, j.weight = weight, j.bias = bias, j.out = y;
  run(j, nullptr, nullptr);
}

void cpu_backward(const Problem& p, const void* grad_output, const void* x, const void* weight, void* grad_input, void* grad_weight, void* grad_bias) {
  Job j{};
  j.fresh = use_large_pages(grad_input, p, p.H, p.W);
  j.p = p, j.in = grad_output, j.weight = weight, j.x = x, j.out = grad_input, j.want_weight = grad_weight, j.want_bias = grad_bias;
  run(j, grad_weight, grad_bias);
}
// ---- end of the CPU kernels for float32 and float64 ----

void cpu::float16_tasks(const Job& j, int64_t begin, int64_t end) { tasks<Half>(j, begin, end); }
void cpu::bfloat16_tasks(const Job& j, int64_t begin, int64_t end) { tasks<BFloat16>(j, begin, end); }
// ---- end of the CPU kernels for 16-bit types ----

#define AT_PER_OPERATOR_HEADERS  // a second less to compile
#if __has_include(<Python.h>)
#include <Python.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#endif
#include <cstring>
#include <optional>
#include <string>
#include <tuple>

#include <ATen/EmptyTensor.h>
#include <torch/library.h>
#ifdef WITH_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
namespace at::cuda { c10::Allocator* getCUDADeviceAllocator(); }  // of ATen/cuda/CUDAContext.h
#endif

// ---- The operators ----
// The CPU and CUDA kernels of forward and backward. Schemas and all that is not computation (autograd, autocast, vmap, fake tensors)
// are in model_new.py.
namespace {

using at::MemoryFormat, at::Tensor;

// Messages are put together without iostreams, which crash in a library that a compiler has linked with a static libstdc++.
std::string text(const char* s) { return s; }
std::string text(const std::string& s) { return s; }
std::string text(int64_t i) { return std::to_string(i); }
std::string text(at::ScalarType t) { return c10::toString(t); }
std::string text(at::Device d) { return d.str(); }
std::string text(at::IntArrayRef sizes) {
  std::string s = "[";
  for (int64_t i : sizes) s += (s.size() > 1 ? ", " : "") + std::to_string(i);
  return s + "]";
}
template <class... Parts> void require(bool good, const Parts&... parts) {
  if (!good) TORCH_CHECK(false, (text(parts) + ...));
}

void check_like(const char* name, const Tensor& t, const Tensor& x) {
  require(t.scalar_type() == x.scalar_type(), "Expected x and ", name, " to have the same dtype, but got x of ", x.scalar_type(),
              " and ", name, " of ", t.scalar_type());
  require(t.device() == x.device(), "Expected x and ", name, " to be on the same device, but got x on ", x.device(), " and ", name,
              " on ", t.device());
}

// Every requirement on the arguments, in one place; returns the kernels' view of them.
Problem check(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, at::IntArrayRef stride, at::IntArrayRef padding, int64_t dilation) {
  require(x.dim() == 4, "Expected x to be 3D (C, H, W) or 4D (N, C, H, W), but got x of size: ", x.sizes());
  auto type = x.scalar_type();
  const bool known = type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16;
  const char wrong_type[] = "Expected x to be float32, float64, float16 or bfloat16, but got x of ";
  TORCH_CHECK_NOT_IMPLEMENTED(!(x.is_cuda() && at::isIntegralType(type, true)), text(wrong_type) + text(type));  // as nn.Conv2d
  require(known, wrong_type, type);
  require(x.layout() == at::kStrided && weight.layout() == at::kStrided, "Expected x and weight to be dense, but one is sparse");
  check_like("weight", weight, x);
  auto s = x.sizes(), w = weight.sizes();
  require(weight.dim() == 4 && w[1] == 1 && w[3] == 1 && w[2] >= 1, "Expected weight of size (C, 1, K, 1), but got weight of size: ", w);
  if (bias) {
    check_like("bias", *bias, x);
    require(bias->dim() == 1 && bias->size(0) == w[0], "Expected bias of size [", w[0], "], but got bias of size: ", bias->sizes());
  }
  require(stride.size() == 2 && stride[0] > 0 && stride[1] > 0, "Expected stride to be two positive integers, but got stride=", at::IntArrayRef(stride));
  require(padding.size() == 4 && padding[0] >= 0 && padding[1] >= 0 && padding[2] >= 0 && padding[3] >= 0,
              "Expected padding to be four non-negative integers (left, right, top, bottom), but got padding=", at::IntArrayRef(padding));
  require(dilation > 0, "Expected dilation to be positive, but got dilation=", dilation);
  require(s[1] == w[0], "Given weight of size ", w, ", expected x", s, " to have ", w[0], " channels, but got ", s[1], " channels instead");
  require(s[2] >= 1 && s[3] >= 1, "Expected x", s, " to have non-empty H and W");
  int64_t H = s[2] + padding[2] + padding[3], W = s[3] + padding[0] + padding[1], reach = (w[2] - 1) * dilation + 1;
  require(H >= reach, "Calculated padded input size per channel: (", H, " x ", W, "). Kernel size: (", reach, " x 1), dilated. ",
              "Kernel size can't be greater than actual input size");
  // nn.Conv2d's rule: the output is channels_last if the input or the weight is; but not float64 on a GPU.
  auto last = MemoryFormat::ChannelsLast;
  return {s[0], s[1], s[2], s[3], (H - reach) / stride[0] + 1, (W - 1) / stride[1] + 1, w[2], stride[0], stride[1], padding[2], padding[0], w[2] > 1 ? dilation : 1,
          type == at::kFloat ? Type::f32 : type == at::kDouble ? Type::f64 : type == at::kHalf ? Type::f16 : Type::bf16,
          (x.suggest_memory_format() == last || weight.suggest_memory_format() == last) && !(x.is_cuda() && type == at::kDouble)};
}

MemoryFormat format(const Problem& p) { return p.channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous; }
// Of the problems of the same memory the plainest: with one channel both orders are the same; rows of a residue class modulo the dilation
// lie side by side with the others' in longer rows. (But contiguous planes of one row a class, which are slower so, and rows that might become
// too long for the kernels.)
Problem plainest(Problem p) {
  p.channels_last = p.channels_last && p.C > 1;
  if (p.stride_h * p.stride_w == 1 && p.padding_w == 0 && p.W == p.W_out && p.C * p.H * p.W < 1 << 26) {
    const int64_t g = std::gcd(std::gcd(p.dilation, p.padding_h), std::gcd(p.H, p.H_out));
    if (p.channels_last || g < p.H) p.H /= g, p.H_out /= g, p.padding_h /= g, p.dilation /= g, p.W *= g, p.W_out *= g;
  }
  return p;
}
const void* data(const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }
void* mutable_data(const Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; }

// On is what differs between CPU and CUDA. Its backward is false if contiguous copies are to be given instead.
template <class On>
Tensor forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, at::IntArrayRef stride, at::IntArrayRef padding, int64_t dilation) {
  Problem p = check(x, weight, bias, stride, padding, dilation);
  On on(x);
  Tensor y = on.empty({p.N, p.C, p.H_out, p.W_out}, x.scalar_type(), format(p));
  if (y.numel() == 0) return y;
  p.x_channels_last = p.type == Type::f64 && x.is_cuda() && !x.is_contiguous() && x.is_contiguous(MemoryFormat::ChannelsLast) &&
                      std::max(p.W, p.W_out) * p.C * p.stride_h * p.dilation < 1 << 27;  // 32-bit indices
  Tensor xd = p.x_channels_last ? x : x.contiguous(format(p)), w = weight.contiguous(), b = bias ? bias->contiguous() : Tensor();
  on.forward(plainest(p), data(xd), data(w), data(b), mutable_data(y));
  return y;
}

template <class On>
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& x, const Tensor& weight, at::IntArrayRef stride,
                                            at::IntArrayRef padding, int64_t dilation, std::array<bool, 3> mask) {
  Problem p = check(x, weight, {}, stride, padding, dilation);
  int64_t out[] = {p.N, p.C, p.H_out, p.W_out};
  check_like("grad_output", grad_output, x);
  require(grad_output.sizes() == at::IntArrayRef(out), "Expected grad_output of size ", at::IntArrayRef(out),
              ", but got grad_output of size: ", grad_output.sizes());
  const MemoryFormat result = format(p);
  On on(x);
  Tensor grad_x, grad_weight, grad_bias;
  if (mask[1]) grad_weight = on.empty(weight.sizes(), x.scalar_type(), MemoryFormat::Contiguous);
  if (mask[2]) grad_bias = on.empty({p.C}, x.scalar_type(), MemoryFormat::Contiguous);
  for (;; p.channels_last = false) {
    if (mask[0]) grad_x = on.empty(x.sizes(), x.scalar_type(), format(p));
    if (grad_output.numel() == 0) {
      if (mask[1]) grad_weight.zero_();
      if (mask[2]) grad_bias.zero_();
      break;
    }
    if (!mask[0] && !mask[1] && !mask[2]) break;
    Tensor g = grad_output.contiguous(format(p)), w = mask[0] ? weight.contiguous() : Tensor(), xd = mask[1] ? x.contiguous(format(p)) : Tensor();
    if (on.backward(plainest(p), data(g), data(xd), data(w), mutable_data(grad_x), mutable_data(grad_weight), mutable_data(grad_bias))) break;
  }
  return {mask[0] && format(p) != result ? grad_x.clone(result) : grad_x, grad_weight, grad_bias};
}

struct OnCPU {
  explicit OnCPU(const Tensor&) {}
  static Tensor empty(at::IntArrayRef size, at::ScalarType type, MemoryFormat format) { return Tensor(at::detail::empty_cpu(size, type, false, format)); }
  static constexpr auto forward = cpu_forward;
  static bool backward(auto... arguments) { return cpu_backward(arguments...), true; }
};

#ifdef WITH_CUDA
struct OnCUDA {
  explicit OnCUDA(const Tensor& x) : stream(c10::cuda::getCurrentCUDAStream(x.get_device())) {
    int current;  // c10's may be one that it has not yet told CUDA
    if (cudaGetDevice(&current) || current != x.get_device() || c10::cuda::current_device() != current) guard.set_device(x.device());
  }
  static Tensor empty(at::IntArrayRef size, at::ScalarType type, MemoryFormat format) {  // at::detail::empty_cuda without another guard
    return Tensor(at::detail::empty_generic(size, at::cuda::getCUDADeviceAllocator(), c10::DispatchKeySet(c10::DispatchKey::CUDA), type, format));
  }
  void forward(const Problem& p, const void* x, const void* weight, const void* bias, void* y) {
    done(launch({.p = p, .in = x, .weight = weight, .bias = bias, .out = y, .stream = stream}));
  }
  bool backward(const Problem& p, const void* grad_output, const void* x, const void* weight, void* grad_x, void* grad_weight, void* grad_bias) {
    const auto allocate = [](size_t bytes, void* self) {
      auto& on = *static_cast<OnCUDA*>(self);
      on.scratch = on.empty({int64_t(bytes)}, at::kByte, MemoryFormat::Contiguous);
      return on.scratch.mutable_data_ptr();
    };
    return done(launch({p, true, grad_output, x, weight, nullptr, grad_x, grad_weight, grad_bias, allocate, this, stream}));
  }
  static bool done(const char* error) {
    if (error == contiguous_is_faster) return false;
    require(!error, "depthwise_kx1: ", error ? error : "");
    return true;
  }
  c10::cuda::OptionalCUDAGuard guard;  // costs as much as an allocation, so only where it must
  cudaStream_t stream;
  Tensor scratch;
};
#endif

#ifndef WITH_CUDA
using OnCUDA = OnCPU;  // unused
#endif
}  // namespace

TORCH_LIBRARY_IMPL(DEPTHWISE_KX1_NAMESPACE, CPU, m) { m.impl("forward", forward<OnCPU>), m.impl("backward", backward<OnCPU>); }
#ifdef WITH_CUDA
TORCH_LIBRARY_IMPL(DEPTHWISE_KX1_NAMESPACE, CUDA, m) { m.impl("forward", forward<OnCUDA>), m.impl("backward", backward<OnCUDA>); }
#endif

// ---- The plain eager call ----
// forward as a Python function with an autograd node of its own: the operator's way, through the dispatcher and back into Python
// for autograd, takes longer than a small convolution. It serves when nothing but autograd would see the call, else it answers None.
#if __has_include(<Python.h>)
// Of torch/csrc/autograd/python_variable.h, which would take as long as the kernels:
struct THPVariable { PyObject_HEAD at::Tensor cdata; };
extern PyObject *THPVariableClass, *ParameterClass;
PyObject* THPVariable_Wrap(at::TensorBase&&);

namespace {
using c10::DispatchKey;
using torch::autograd::Node, torch::autograd::SavedVariable, torch::autograd::variable_list;

constexpr c10::DispatchKeySet plain_keys{DispatchKey::CPU, DispatchKey::AutogradCPU, DispatchKey::AutocastCPU, DispatchKey::ADInplaceOrView,
#ifdef WITH_CUDA
                                         DispatchKey::CUDA, DispatchKey::AutogradCUDA, DispatchKey::AutocastCUDA
#endif
};
bool within(c10::DispatchKeySet keys, c10::DispatchKeySet allowed) { return !(keys.raw_repr() & ~allowed.raw_repr()); }

// Nothing of a mode, transform, subclass, tangent or lazy conjugate
template <class... Tensors> bool dense(const Tensors&... tensors) {
  return within(c10::impl::tls_local_dispatch_key_set().included_, c10::default_included_set) &&
         (... && (!tensors.defined() || (within(tensors.key_set(), plain_keys) && !tensors._fw_grad(0).defined())));
}
// nor of autocast, a trace or a profiler
template <class... Tensors> bool plain(const Tensors&... tensors) {
  const auto excluded = c10::InferenceMode::is_enabled() ? c10::default_excluded_set | c10::autograd_dispatch_keyset : c10::default_excluded_set;
  return c10::impl::tls_local_dispatch_key_set().excluded_ == excluded && !at::impl::torch_function_mode_enabled() && !at::hasCallbacks() && dense(tensors...);
}

struct DepthwiseKx1Backward : Node {
  SavedVariable x, weight;
  std::array<int64_t, 2> stride;
  std::array<int64_t, 4> padding;
  int64_t dilation;

  variable_list apply(variable_list&& grads) override {
    if (!grads[0].defined()) return variable_list(3);
    std::unique_lock<std::mutex> lock(mutex_);
    const Tensor g = grads[0], x = this->x.unpack(), w = weight.unpack();
    lock.unlock();
    const std::array<bool, 3> mask = {task_should_compute_output(0), task_should_compute_output(1), task_should_compute_output(2)};
    if (!at::GradMode::is_enabled() && dense(g, x, w)) {
      auto [grad_x, grad_weight, grad_bias] = (x.is_cuda() ? backward<OnCUDA> : backward<OnCPU>)(g, x, w, stride, padding, dilation, mask);
      return {std::move(grad_x), std::move(grad_weight), std::move(grad_bias)};
    }
    torch::jit::Stack stack{g, x, w, at::IntArrayRef(stride), at::IntArrayRef(padding), dilation, c10::List<bool>({mask[0], mask[1], mask[2]})};
    c10::Dispatcher::singleton().findSchemaOrThrow(C10_STRINGIZE(DEPTHWISE_KX1_NAMESPACE) "::backward", "").callBoxed(stack);
    return {stack[0].toTensor(), stack[1].toTensor(), stack[2].toTensor()};
  }
  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    x.reset_data();
    weight.reset_data();
  }
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& key) const override {
    key.collect(x, false), key.collect(weight, false), key.collect(dilation);
    for (int64_t i : stride) key.collect(i);
    for (int64_t i : padding) key.collect(i);
  }
  variable_list apply_with_saved(const variable_list& grads, torch::dynamo::autograd::SwapSavedVariables& traced) override {
    traced.before(x), traced.before(weight);
    variable_list result = apply(variable_list(grads));
    traced.after(x), traced.after(weight);
    return result;
  }
  std::string name() const override { return "DepthwiseKx1Backward"; }
};

// Nodes are held by std::shared_ptr in torch 2.11, by c10::intrusive_ptr later.
template <class N, class Pointer = decltype(torch::autograd::Edge::function)> Pointer make_node() {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<Node>>) return Pointer(new N, [](auto* node) { deleteNode(node); });
  else return c10::make_intrusive<N>();
}

template <size_t n> void read(PyObject* tuple, std::array<int64_t, n>& to) {
  for (size_t i = 0; i < n; i++) to[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, i));
}

bool is_tensor(PyObject* object) {
  const auto type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  return type == THPVariableClass || type == ParameterClass;
}
const Tensor& tensor(PyObject* object) { return reinterpret_cast<THPVariable*>(object)->cdata; }

struct WithoutGIL {
  PyThreadState* state = PyEval_SaveThread();
  ~WithoutGIL() { PyEval_RestoreThread(state); }
};

// Of x, nn.Conv2d's dictionary of parameters, (stride, padding, dilation). Errors are left to the operator, but those of Python's hooks.
PyObject* eager(PyObject*, PyObject* const* arguments, Py_ssize_t) try {
  static PyObject *const weight_name = PyUnicode_InternFromString("weight"), *const bias_name = PyUnicode_InternFromString("bias");
  PyObject *const x_ = arguments[0], *const weight_ = PyDict_GetItem(arguments[1], weight_name), *const bias_ = PyDict_GetItem(arguments[1], bias_name);
  if (!weight_ || !bias_ || !is_tensor(x_) || !is_tensor(weight_) || !(bias_ == Py_None || is_tensor(bias_))) Py_RETURN_NONE;
  const Tensor x = tensor(x_), weight = tensor(weight_), bias = bias_ == Py_None ? Tensor() : tensor(bias_);
  if (x.dim() != 4 || !plain(x, weight, bias)) Py_RETURN_NONE;
  std::array<int64_t, 2> stride;
  std::array<int64_t, 4> padding;
  read(PyTuple_GET_ITEM(arguments[2], 0), stride), read(PyTuple_GET_ITEM(arguments[2], 1), padding);
  const int64_t dilation = PyLong_AsLongLong(PyTuple_GET_ITEM(arguments[2], 2));
  Tensor y;
  {
    WithoutGIL without;
    at::AutoDispatchBelowADInplaceOrView below;
    y = (x.is_cuda() ? forward<OnCUDA> : forward<OnCPU>)(x, weight, bias_ == Py_None ? std::nullopt : std::optional(bias), stride, padding, dilation);
  }
  if (torch::autograd::compute_requires_grad(x, weight, bias)) {
    auto pointer = make_node<DepthwiseKx1Backward>();
    auto& node = static_cast<DepthwiseKx1Backward&>(*pointer);
    node.set_next_edges(torch::autograd::collect_next_edges(x, weight, bias));
    node.x = SavedVariable(x, false), node.weight = SavedVariable(weight, false);
    node.stride = stride, node.padding = padding, node.dilation = dilation;
    torch::autograd::set_history(y, pointer);
  }
  return THPVariable_Wrap(std::move(y));
} catch (...) {
  if (PyErr_Occurred()) return nullptr;
  Py_RETURN_NONE;
}
}  // namespace

// The function, or None where THPVariable is not what is declared above.
extern "C" __attribute__((visibility("default"))) PyObject* depthwise_kx1_eager() {
  const Tensor probe(at::detail::empty_cpu({0}, at::kFloat));
  PyObject* const wrapped = THPVariable_Wrap(Tensor(probe));
  const bool known = !std::memcmp(&reinterpret_cast<THPVariable*>(wrapped)->cdata, &probe, sizeof probe);
  Py_DECREF(wrapped);
  if (!known) Py_RETURN_NONE;
  static PyMethodDef method{"eager", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(eager)), METH_FASTCALL, nullptr};
  return PyCFunction_New(&method, nullptr);
}
#endif

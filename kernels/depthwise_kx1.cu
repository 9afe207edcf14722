#include <cuda_runtime.h>

#include <optional>
#include <type_traits>
#include <utility>

// Of a launch's sums of x * grad_output and of grad_output.
struct Sums {
  int first_tap, dots;
  int64_t blocks;  // of a channel
  bool repair;     // one that is NaN is to be made from the definition, at stride 1
};
const char* add_up(const Call&, const Sums&, const void* partial);

inline namespace gpu {  // not an unnamed one: the parts share its plans

// Sums are kept in float, for double in double.
template <class T> struct SumOf { using type = float; };
template <> struct SumOf<double> { using type = double; };
template <class T> using Sum = typename SumOf<T>::type;

// All access to global memory is by vectors of V numbers (after Packed128 of karpathy/llm.c).
template <class T, int V> struct alignas(sizeof(T) * V) Packed { T at[V]; };
template <int V, class T> __device__ Packed<T, V> load(const T* p) { return *reinterpret_cast<const Packed<T, V>*>(p); }
template <int V, class T> __device__ void store(T* p, const Packed<T, V>& v) { *reinterpret_cast<Packed<T, V>*>(p) = v; }

// 16 bytes at once: the compiler would split some of these.
inline __device__ void store_16(void* to, uint4 v) {
  asm volatile("st.global.v4.b32 [%0], {%1,%2,%3,%4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// From compute capability 10.0 on registers of some kernels have room for a block less.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int fewer_blocks = 1;
#else
constexpr int fewer_blocks = 0;
#endif

// Lets `reduce` start as soon as all blocks have: it waits for their sums.
inline __device__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// 16-bit numbers are converted in pairs.
struct f16 { uint16_t bits; };
struct bf16 { uint16_t bits; };
template <class T> __device__ float2 widen_pair(uint32_t word) {
  float2 to;
  if constexpr (std::is_same_v<T, f16>)
    asm("{.reg .b16 x, y; mov.b32 {x, y}, %2; cvt.f32.f16 %0, x; cvt.f32.f16 %1, y;}" : "=f"(to.x), "=f"(to.y) : "r"(word));
  else to = {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000)};
  return to;
}
template <class T> __device__ uint32_t narrow_pair(float x, float y) {
  uint32_t word;
#if __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, f16>) asm("cvt.rn.f16x2.f32 %0, %2, %1;" : "=r"(word) : "f"(x), "f"(y));
  else asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(word) : "f"(x), "f"(y));
#else
  const auto round = [](float v) { return isnan(v) ? 0x7fff : (__float_as_uint(v) + 0x7fff + (__float_as_uint(v) >> 16 & 1)) >> 16; };
  if constexpr (std::is_same_v<T, f16>)
    asm("{.reg .b16 x, y; cvt.rn.f16.f32 x, %1; cvt.rn.f16.f32 y, %2; mov.b32 %0, {x, y};}" : "=r"(word) : "f"(x), "f"(y));
  else word = round(x) | round(y) << 16;
#endif
  return word;
}
template <class T> __device__ Sum<T> widen(T v) {
  if constexpr (sizeof(T) == 2) return widen_pair<T>(v.bits).x;
  else return v;
}
template <class T> __device__ T narrow(Sum<T> v) {
  if constexpr (sizeof(T) == 2) return {uint16_t(narrow_pair<T>(v, 0))};
  else return v;
}
template <int V, class T> __device__ void unpack(Sum<T> (&to)[V], const Packed<T, V>& from) {
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if constexpr (V % 2 == 0 && sizeof(T) == 2) {
      const float2 both = widen_pair<T>(reinterpret_cast<const uint32_t*>(from.at)[v / 2]);
      to[v] = v % 2 ? both.y : both.x;
    } else to[v] = widen(from.at[v]);
  }
}
template <class T, int V> __device__ Packed<T, V> pack(const Sum<T> (&from)[V]) {
  Packed<T, V> to;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if constexpr (V % 2 == 0 && sizeof(T) == 2) reinterpret_cast<uint32_t*>(to.at)[v / 2] = narrow_pair<T>(from[v / 2 * 2], from[v / 2 * 2 + 1]);
    else to.at[v] = narrow<T>(from[v]);
  }
  return to;
}

// N vectors one `stride` apart; zeros for those whose bit is not set in `which`. Branch: all of them by unconditional loads where
// all are set, which pays but for contiguous forward passes, by measurement.
template <int V, int N, bool Branch, class T> __device__ void fetch(Sum<T> (&to)[N][V], const T* from, uint32_t stride, uint32_t which) {
  Packed<T, V> raw[N];
  uint32_t at = 0;
  if (Branch && which == ~0u >> (32 - N)) {
#pragma unroll
    for (int n = 0; n < N; ++n, at += stride) raw[n] = load<V>(from + at);
  } else {
#pragma unroll
    for (int n = 0; n < N; ++n, at += stride) raw[n] = which >> n & 1 ? load<V>(from + at) : Packed<T, V>{};
  }
#pragma unroll
  for (int n = 0; n < N; ++n) unpack(to[n], raw[n]);
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// n / divisor and n % divisor for 0 <= n < 2^31 by a multiplication (Granlund and Montgomery, 1994).
struct Divisor {
  uint32_t divisor, multiplier, shift, one;  // one: all bits set where the divisor is 1
  Divisor() = default;
  Divisor(int64_t d) : divisor(d), multiplier(0), shift(0), one(d == 1 ? ~0u : 0) {
    while ((1ll << shift) < d) ++shift;
    if (d > 1) multiplier = ((1ull << (31 + shift)) + d - 1) / d, --shift;
  }
  __device__ int over(uint32_t n) const { return (__umulhi(n, multiplier) | (n & one)) >> shift; }
  __device__ int operator()(int n, int& remainder) const { const int q = over(n); remainder = n - q * int(divisor); return q; }
  __device__ int steps(int n) const { return over(max(n, 0) + divisor - 1); }  // of `divisor` that cover n
};

// Bits [lo, hi) of a word.
inline __device__ uint32_t bits(int lo, int hi) {
  lo = max(lo, 0), hi = min(hi, 32);
  return hi <= lo ? 0 : ~0u >> (32 - (hi - lo)) << lo;
}

// Forward: out is y, in is x. Transposed (input gradient): out is grad_input, in is grad_output, taps are reversed; for the other
// gradients, x * grad_output is summed for each tap, and grad_output.
struct Pass {
  Problem p;
  int K, C;
  bool reversed, has_dots, has_bias_sum;
  int in_rows, in_width, out_rows, out_width;  // planes of in and out, in rows and pixels
  uint32_t in_columns, out_columns;            // numbers in their rows: of all channels if channels_last
  int64_t in_plane, out_plane;                 // numbers in them
  Divisor dilation;
  int row_shift, column_shift;                 // row and column of in that tap 0 takes to row and column 0 of out, at stride 1
  int blocks;                                  // that sum x * grad_output, for each of `dots` taps, and grad_output for a channel: to partial[C][blocks][dots + 1]
  // f(m, k) for each m < M: row r of out meets row r + first + m of in by tap k, or if k < 0 by none.
  template <int M, bool Dilated, class F> __device__ void each_tap(int first, const F& f) const {
    const int d = Dilated ? dilation.divisor : 1, apart = first - row_shift;
    int k = !Dilated ? apart : apart < 0 ? -dilation.steps(-apart) : dilation.over(apart), rest = apart - k * d;
#pragma unroll
    for (int m = 0; m < M; ++m) {
      f(m, rest == 0 && k < K ? k : -1);
      if (++rest == d) rest = 0, ++k;
    }
  }
};

// Whether M are all distances from one of R rows to another: then K and the dilation may be any.
constexpr bool all_distances(int R, int M) { return M == 2 * R - 1; }

// From one tap's sums in shared memory to the next's, V for each thread: as for one more, for different banks.
__host__ __device__ constexpr int sums_pitch(int threads, int V = 1) { return (threads + 1) * V; }

// Adds up a block's sums of each tap, and of grad_output, [rows][pitch] in shared memory, in fixed order: over the columns of the same channel, which lie
// in turn or side by side. `place` says of which channel its first column's is, and which of its blocks' sums these are, or -1: nobody's.
template <bool InTurn, class S, class Place>
__device__ void sum_threads(const Pass& a, const S* sums, int rows, int pitch, int columns, int channels, S* partial, const Place& place) {
  __syncthreads();
  const int each = InTurn ? 1 : columns / channels, stride = InTurn ? channels : 1, width = columns > 32 * channels ? 16 : 1, lane = threadIdx.x & (width - 1), count = rows * channels;
  const int step = blockDim.x / width, channel_step = step / rows;  // of i, which is `rows` times the channel and the row k: no division in the loop
  for (int i = threadIdx.x / width, channel = i / rows, k = i - channel * rows; i < round_up(count, 2); i += step) {  // both halves of a warp
    const int first = channel * each, end = InTurn ? columns : min(first + each, columns);
    S sum = 0;
#pragma unroll 4
    for (int j = first + lane * stride; j < end; j += width * stride) sum += sums[k * pitch + j];
    for (int o = width / 2; o; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
    int c;
    const int64_t block = place(first, c);
    if (lane == 0 && i < count && block >= 0) partial[(c * a.blocks + block) * rows + k] = sum;
    channel += channel_step, k += step - channel_step * rows;
    if (k >= rows) k -= rows, ++channel;
  }
}

// How a launch walks its planes. Rows of out one `out_step` apart meet the same taps in rows of in one `in_step` apart, whatever stride
// s and dilation d are: with g = gcd(s, d), L = s d / g, a forward step is d / g rows of y and L rows of x, and every
// (s / g)-th tap shares them. So one loop, acc[r] += weight[m] * in[r + m], serves all strides, dilations and both passes.
struct Walk : Pass {
  int row_begin;                                   // the first row of out that is walked, and the pixels, of out or, transposed, of in:
  int pixel_begin, pixels;                         // beyond those that meet where a bias gradient wants that
  Divisor pixel, channels;                         // numbers in a pixel: C if channels_last, else 1; C
  Divisor in_step, out_step;
  int taps_step;                                   // taps that share rows are this far apart
  Divisor groups, groups_per_residue;              // of R rows, one out_step apart: in a plane; in a residue class mod out_step
  int plane_step;
  int lines;                                       // a line is one group of one plane
  int log2_tx;                                     // threads of a block along a row; the others take lines
  Divisor column_tiles, slices;                    // a block keeps its slice: its columns and, for contiguous weight
  int splits;                                      // gradients, its channel; the slice's lines are dealt to `splits` blocks
  int dot_begin, dot_end;                          // taps whose weight gradient this launch sums
};

// Reads `in` (and x if Gradient) once but for the rows that threads above one another share, which L1 serves; writes out
// once. A thread makes R rows of V numbers, by M taps at a time. Registers: R x V sums, R + M - 1 rows of in, R of x.
// Gradient also sums x * grad_output for each tap, and grad_output, per thread in shared memory and at its end per block
// in `partial`. InLast: in alone is channels_last; lines side by side are of neighbouring channels, so that sectors of both tensors are whole.
template <class T, int V, int R, int M, bool ChannelsLast, bool Gradient, bool InLast = false>
__global__ void __launch_bounds__(ChannelsLast ? 256 : 128, ChannelsLast ? 2 : 4) walk(const __grid_constant__ Walk a, const T* __restrict__ in, const T* __restrict__ x,
                                            const T* __restrict__ weight, const T* __restrict__ bias, T* __restrict__ out,
                                            Sum<T>* __restrict__ partial) {
  constexpr int Vw = ChannelsLast ? V : 1;  // distinct weights in a vector
  extern __shared__ __align__(128) unsigned char shared[];
  const int tx = 1 << a.log2_tx, lane = threadIdx.x & (tx - 1), lines_per_tile = blockDim.x >> a.log2_tx;
  const int K = int(a.p.K), stride = int(a.p.stride_h), dilation = int(a.p.dilation);
  int slice, tile_column, c;
  const int split = a.slices(blockIdx.x, slice);
  const int first_plane = a.column_tiles(slice, tile_column);
  tile_column *= tx * V;

  // The thread's columns: where they are in out and in. Transposed, to a pixel of in belong those of out up to the next.
  const int pixel = a.pixel(tile_column + lane * V, c), of_y = a.pixel_begin + pixel, of_x = of_y * int(a.p.stride_w) - int(a.p.padding_w);
  const int w = Gradient ? of_x : of_y, in_w = Gradient ? of_y : of_x;
  const bool walked = pixel < a.pixels, owned = walked && w >= 0 && w < a.out_width, reached = walked && in_w >= 0 && in_w < a.in_width;
  const int in_column = in_w * int(InLast ? a.C : a.pixel.divisor) + c, out_column = w * int(a.pixel.divisor) + c;
  const uint32_t in_stride = a.in_columns * a.in_step.divisor, out_stride = a.out_columns * a.out_step.divisor;

  Packed<T, Vw>* weights = reinterpret_cast<Packed<T, Vw>*>(shared);  // channels_last: [K][tx]
  Packed<Sum<T>, Vw>* sums = reinterpret_cast<Packed<Sum<T>, Vw>*>(shared + (ChannelsLast && weight ? (sizeof(T) * K * tx * V + 15) / 16 * 16 : 0));
  const int dots = a.dot_end - a.dot_begin, pitch = sums_pitch(blockDim.x);  // [dots + 1][pitch], the last for grad_bias
  if (ChannelsLast && weight) {
    for (int i = threadIdx.x; i < K * tx * V; i += blockDim.x) {
      int channel;
      a.channels(tile_column + i / K, channel);
      reinterpret_cast<T*>(weights)[i % K * tx * V + i / K] = weight[int64_t(channel) * K + i % K];
    }
    __syncthreads();
  }
  if (Gradient)
    for (int i = 0; i <= dots; ++i) sums[i * pitch + threadIdx.x] = {};

  for (int line = split * lines_per_tile + (threadIdx.x >> a.log2_tx); line < a.lines; line += a.splits * lines_per_tile) {
    int group, channel = first_plane, image = 0, plane;
    if (InLast) image = a.groups(a.channels(line, channel), group), plane = image * a.C + channel;
    else {
      plane = a.groups(line, group) * a.plane_step + first_plane;
      if (!Gradient || ChannelsLast) a.channels(plane, channel);
    }
    int row = a.row_begin;
    if (a.out_step.divisor > 1) row += a.groups_per_residue(group, group);
    row += group * R * int(a.out_step.divisor);
    const auto inside = [&] { return bits(a.out_step.steps(-row), min(R, a.out_step.steps(a.out_rows - row))); };  // of the R rows
    const uint32_t mine = owned ? inside() : 0;
    const uint32_t paired = Gradient && reached && dots ? mine : 0;
    const int64_t out_at = plane * a.out_plane + int64_t(row) * int(a.out_columns) + out_column;
    const T* const plane_in = in + ((InLast ? image * a.in_plane + channel : plane * a.in_plane) + in_column);

    Sum<T> acc[R][V], own[R][V], rows[R + M - 1][V];
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int v = 0; v < V; ++v) acc[r][v] = 0;
    if (!Gradient && bias) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const Sum<T> b = widen(bias[ChannelsLast ? (c + v) % a.C : channel]);
#pragma unroll
        for (int r = 0; r < R; ++r) acc[r][v] = b;
      }
    }
    if (Gradient && dots) fetch<V, R, true>(own, x + out_at, out_stride, paired);

    for (int phase = 0; phase < (Gradient ? 1 : a.taps_step); ++phase) {
      int tap = phase, in_row = Gradient ? row + int(a.p.padding_h) : row * stride + tap * dilation - int(a.p.padding_h);
      if (Gradient && stride > 1) {  // only taps k with (row + padding - k dilation) divisible by the stride reach a row
        while (tap < a.taps_step && (in_row - tap * dilation) % stride) ++tap;
        if (tap == a.taps_step) break;
        in_row = (in_row - tap * dilation) / stride;
      }
      const int in_step = a.in_step.divisor, turn = Gradient ? -M * in_step : M * in_step;
      if (Gradient) in_row -= (M - 1) * in_step;
      for (int first = tap; first < K; first += M * a.taps_step, in_row += turn) {
        // Row r of out meets row t = r + m of in by tap m, transposed by tap M - 1 - m, of these M.
        const int taps = a.taps_step == 1 ? min(M, K - first) : min(M, (K - first + a.taps_step - 1) / a.taps_step), unused = Gradient ? M - taps : 0;
        const uint32_t needed = bits(unused, unused + R + taps - 1);
        const uint32_t valid = reached ? bits(a.in_step.steps(-in_row), a.in_step.steps(a.in_rows - in_row)) & ~(~0u << (R + M - 1)) : 0;
        if (!valid) continue;  // these taps meet no row
        Sum<T> wk[M];
#pragma unroll
        for (int m = 0; m < M; ++m) {
          const int j = Gradient ? M - 1 - m : m;
          wk[m] = !ChannelsLast && weight && j < taps ? widen(weight[int64_t(channel) * K + first + j * a.taps_step]) : Sum<T>(0);
        }
        fetch<V, R + M - 1, Gradient || ChannelsLast>(rows, plane_in + int64_t(in_row) * int(a.in_columns), in_stride, taps == M ? valid : valid & needed);
        if (Gradient && a.has_bias_sum && first == 0) {  // a row of grad_output meets tap 0, here in row R + M - 1, just once
#pragma unroll
          for (int v = 0; v < V; ++v)
#pragma unroll
            for (int r = 0; r < R; ++r) sums[dots * pitch + threadIdx.x].at[v % Vw] += rows[M - 1 + r][v];
        }

        // Guarded where rows lie beyond the plane: left out, not multiplied by zero, for weight or x may be infinite.
        const auto multiply = [&](auto is_guarded) {
          constexpr bool guarded = decltype(is_guarded)::value;
#pragma unroll
          for (int m = 0; m < M; ++m) {
            const int j = Gradient ? M - 1 - m : m, k = first + j * a.taps_step;
            const uint32_t meets = valid >> m & mine;
            if (j >= taps || (guarded && !meets)) continue;
            Sum<T> w_k[Vw] = {wk[m]}, dot[V] = {};
            if (ChannelsLast && weight) unpack(w_k, weights[k * tx + lane]);
#pragma unroll
            for (int r = 0; r < R; ++r) {
              if (guarded && !(meets >> r & 1)) continue;
#pragma unroll
              for (int v = 0; v < V; ++v) {
                acc[r][v] += w_k[v % Vw] * rows[r + m][v];
                if (Gradient && (!guarded || paired >> r & 1)) dot[v] += own[r][v] * rows[r + m][v];
              }
            }
            if (Gradient && k >= a.dot_begin && k < a.dot_end) {
              Packed<Sum<T>, Vw>& sum = sums[(k - a.dot_begin) * pitch + threadIdx.x];
#pragma unroll
              for (int v = Vw; v < V; ++v) dot[v % Vw] += dot[v];
#pragma unroll
              for (int v = 0; v < Vw; ++v) sum.at[v] += dot[v];
            }
          }
        };
        if ((valid & needed) == needed && (!Gradient || !dots || paired == bits(0, R))) multiply(std::false_type{});
        else multiply(std::true_type{});
      }
    }
    if (out) {
      T* to = out + out_at;
      uint32_t at = 0;
#pragma unroll
      for (int r = 0; r < R; ++r, at += out_stride)
        if (mine >> r & 1) store<V>(to + at, pack<T, V>(acc[r]));
      if (Gradient && a.p.stride_w > 1 && walked) {  // pixels that none of in reaches
#pragma unroll 1
        for (int64_t i = max(w + 1, 0); i < min(w + a.p.stride_w, int64_t(a.out_width)); ++i) {
          at = (i - w) * a.pixel.divisor;
#pragma unroll
          for (int r = 0; r < R; ++r, at += out_stride)
            if (inside() >> r & 1) store<V>(to + at, Packed<T, V>{});
        }
      }
    }
  }

  if (Gradient && partial) {
    Sum<T>* const all = &sums[0].at[0];
    const int columns = ChannelsLast ? tx * V : blockDim.x, all_columns = Vw * blockDim.x, channels = ChannelsLast ? int(min(a.p.C, int64_t(columns))) : 1;
    if (ChannelsLast) __syncthreads();
    for (int i = threadIdx.x; columns < all_columns && i < (dots + 1) * columns; i += blockDim.x) {  // of the threads above one another
      Sum<T>* const of = all + i / columns * Vw * pitch + i % columns;
      for (int j = columns; j < all_columns; j += columns) *of += of[j];
    }
    sum_threads<ChannelsLast>(a, all, dots + 1, Vw * pitch, columns, channels, partial, [&](int first, int& c) {
      if (!ChannelsLast) return c = first_plane, int64_t(tile_column / (tx * V)) * a.splits + split;
      const int pixel = a.channels(tile_column + first, c), whole = channels == a.p.C;
      return whole || pixel < a.pixels ? int64_t(whole ? slice : pixel) * a.splits + split : -1;
    });
  }
}

// R of `slide`, and blocks of a multiprocessor, by measurement.
constexpr int slide_rows(int size, int M) { return size == 2 ? M == 3 ? 5 : 7 : M == 3 ? 6 : 5; }
constexpr int slide_blocks(int size, int M, bool channels_last) { return size == 2 ? M > 3 ? 4 : channels_last ? 5 : 6 : M > 3 ? 5 : 6; }
// Whether registers have room to load a channel's weights one by one, where no vectors of them can be.
__host__ __device__ constexpr bool slide_singly(int size, int M) { return M == 3 || (M == 5 && size == 4); }

// `walk` for M taps forward at stride 1: rows stay packed, as loaded, until their turn, and a sum lives for one row of out, so that registers
// have room for more rows on their way, and fewer are read twice. Registers: R + M - 1 packed rows of in, M of numbers.
template <class T, int V, int R, int M, bool ChannelsLast>
__global__ void __launch_bounds__(128, slide_blocks(sizeof(T), M, ChannelsLast))
slide(const __grid_constant__ Walk a, const T* __restrict__ in, const T* __restrict__, const T* __restrict__ weight, const T* __restrict__ bias,
      T* __restrict__ out, float* __restrict__) {
  constexpr int Vw = ChannelsLast ? V : 1;
  const int tx = 1 << a.log2_tx, lines_per_tile = blockDim.x >> a.log2_tx, d = a.out_step.divisor;
  int slice, tile_column, c, group;
  const int split = a.slices(blockIdx.x, slice), first_plane = a.column_tiles(slice, tile_column), line = split * lines_per_tile + (threadIdx.x >> a.log2_tx);
  if (line >= a.lines) return;
  const int column = (tile_column * tx + (threadIdx.x & (tx - 1))) * V, in_column = column - int(a.p.padding_w) * a.pixel.divisor;
  const bool owned = column < int(a.out_columns), reached = in_column >= 0 && in_column < int(a.in_columns);
  const uint32_t in_stride = a.in_columns * d, out_stride = a.out_columns * d, all_in = ~0u >> (33 - R - M), all_out = ~0u >> (32 - R);
  const bool singly = ChannelsLast && slide_singly(sizeof(T), M) && (a.C % V || reinterpret_cast<uintptr_t>(weight) % 16);  // weights are loaded, for those of a vector of channels may lie anywhere
  const int plane = a.groups(line, group) * a.plane_step + first_plane;
  int row = d > 1 ? a.groups_per_residue(group, group) : 0;
  row += group * R * d;
  const int in_row = row + a.row_shift;
  const uint32_t valid = reached ? bits(a.in_step.steps(-in_row), a.in_step.steps(a.in_rows - in_row)) & all_in : 0;
  const uint32_t mine = owned ? bits(0, a.out_step.steps(a.out_rows - row)) & all_out : 0;
  const T* const from = in + (plane * a.in_plane + int64_t(in_row) * int(a.in_columns) + in_column);
  T* const to = out + (plane * a.out_plane + int64_t(row) * int(a.out_columns) + column);
  ChannelsLast ? a.pixel(column, c) : a.channels(plane, c);
  const auto make = [&]<bool guarded> {
    Packed<T, V> raw[R + M - 1];
    uint32_t at = 0;
#pragma unroll
    for (int t = 0; t < R + M - 1; ++t, at += in_stride) raw[t] = !guarded || valid >> t & 1 ? load<V>(from + at) : Packed<T, V>{};
    Packed<T, Vw> taps[M];  // of a channel, then of the next
    float initial[Vw], window[M][V];
#pragma unroll
    for (int m = 0; m < M; ++m) taps[m] = !singly ? load<Vw>(weight + (c * M + m * Vw)) : Packed<T, Vw>{};
#pragma unroll
    for (int v = 0; v < Vw; ++v) {
      initial[v] = bias ? widen(bias[c]) : 0;
#pragma unroll
      for (int i = v * M; singly && i < v * M + M; ++i) taps[i / Vw].at[i % Vw] = weight[c * M + i - v * M];
      if (++c == a.C) c = 0;
    }
    at = 0;
#pragma unroll
    for (int t = 0; t < R + M - 1; ++t) {
      unpack(window[t % M], raw[t]);
      const int r = t - M + 1;
      if (r < 0) continue;
      float acc[V];
#pragma unroll
      for (int v = 0; v < V; ++v) acc[v] = initial[v % Vw];
#pragma unroll
      for (int m = 0; m < M; ++m) {
        if (guarded && !(valid >> (r + m) & 1)) continue;  // left out, not multiplied by zero, for weight may be infinite
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const int tap = v % Vw * M + m;
          acc[v] += widen(taps[tap / Vw].at[tap % Vw]) * window[(t + 1 + m) % M][v];
        }
      }
      if (!guarded || mine >> r & 1) {
        const Packed<T, V> packed = pack<T, V>(acc);
        store_16(to + at, reinterpret_cast<const uint4&>(packed));
      }
      at += out_stride;
    }
  };
  valid == all_in && mine == all_out ? make.template operator()<false>() : make.template operator()<true>();
}

// Bytes from global to shared memory, of which `count` count, the others are zeros; asynchronous from compute capability 8.0 on.
template <int bytes = 16> __device__ void copy_async(void* to, const void* from, int count) {
#if __CUDA_ARCH__ >= 800
  if constexpr (bytes == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(uint32_t(__cvta_generic_to_shared(to))), "l"(from), "r"(count) : "memory");
  else asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(uint32_t(__cvta_generic_to_shared(to))), "l"(from), "n"(bytes), "r"(count) : "memory");
#else
  *static_cast<int4*>(to) = *static_cast<const int4*>(from);
#endif
}
template <int Younger> __device__ void await_copies() {  // all but those of the `Younger` latest groups
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(Younger) : "memory");
#endif
}
inline __device__ void end_group_of_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <class V> __device__ V at(const unsigned char* p) { return *reinterpret_cast<const V*>(p); }

// How a launch marches over its planes at stride 1.
struct March : Pass {
  int column_begin;                    // where in out the rows that are walked begin: beyond its own where a bias gradient wants that
  int columns, images;                 // numbers of them, of so many images side by side; contiguous, of so many planes, of neighbouring channels
  Divisor row;                         // numbers of one of them
  int in_shift;                        // number of in that meets number 0 of out
  Divisor channels, residues;            // rows of one residue class modulo the dilation form a plane of their own
  int planes, band_rows;               // `images` at once, of all residue classes
  Divisor tiles, group_tiles, bands;   // a block keeps its tile of columns (of `group_tiles` of the same channels) and its band of rows; the planes are dealt to `splits` blocks
  int splits;
};

constexpr int march_threads = 128;
__host__ __device__ constexpr int march_slots(int M) { return M < 7 ? 2 * M : M; }
// V, and blocks of a multiprocessor, for which registers and shared memory have room.
constexpr int march_vector(int size, int M, bool channels_last, bool gradient) {
  if (!channels_last) return 16 / size;
  return (gradient ? M > 7 ? 2 * size : M > 3 ? 4 * size : 16 : M > 21 ? 8 : M > 7 ? 4 * size : 16) / size;
}
constexpr int march_blocks(int M, int V, bool channels_last, bool gradient) {
  const int numbers = M * (V + (channels_last ? V : 1) * (gradient ? 2 : 1));
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  if (!channels_last) return numbers < 66 ? 3 : 2;  // one more would spill
#endif
  return numbers < 66 ? 4 : numbers <= 120 ? 3 : 2;
}

// Reads `in` (and x if Gradient) once but for the K - 1 rows where bands meet, writes out once. A thread marches over V columns, of one plane or
// in channels_last of as many channels; rows of them lie in its own part of shared memory from asynchronous copy to use, `slots` - 1 rows
// later. Registers: M rows and taps, and if Gradient the sums of x * grad_output for each tap, and of grad_output. Of taps beyond K, `optional`
// ones are left out by a branch for each, which by measurement costs more than it saves elsewhere.
// Every other band is marched over upwards: where bands meet, blocks read the same rows at the same time, and L2 has them.
//
// Rows outside the plane are zeros, and so are taps beyond K: where a tap or a result is not finite, the thread's columns are done again from
// the definition; sums that become NaN because x is not finite, `reduce` repairs.
template <class T, int V, int M, bool ChannelsLast, bool Gradient>
__global__ void __launch_bounds__(march_threads, march_blocks(M, V, ChannelsLast, Gradient))
march(const __grid_constant__ March a, const T* __restrict__ in, const T* __restrict__ x, const T* __restrict__ weight,
      const T* __restrict__ bias, T* __restrict__ out, float* __restrict__ partial) {
#if __CUDA_ARCH__ >= 800
  constexpr int Vw = ChannelsLast ? V : 1, bytes = sizeof(T) * V, slots = march_slots(M), slot_bytes = march_threads * bytes * (Gradient ? 2 : 1);
  constexpr int optional = M == 3 ? 2 : V == 1 ? 0 : Gradient && M > 11 ? 9 : Gradient || M > 11 ? 0 : 3;
  extern __shared__ __align__(128) unsigned char shared[];
  const int K = a.K, d = a.dilation.divisor;
  int tile, band, number;
  const int split = a.bands(a.tiles(blockIdx.x, tile), band), first_channel = ChannelsLast ? 0 : a.group_tiles(tile, tile) * a.images, first_column = tile * march_threads * V;
  const int walked = first_column + threadIdx.x * V, image = a.row(walked, number), column = a.column_begin + number, in_column = column + a.in_shift;
  const bool busy = walked < a.columns && (ChannelsLast || first_channel + image < a.C), owned = busy && column >= 0 && column < int(a.out_columns), reached = busy && in_column >= 0 && in_column < int(a.in_columns);
  const bool up = band % 2;
  const int row_step = up ? -d : d;
  const int64_t in_step = int64_t(row_step) * a.in_columns, out_step = int64_t(row_step) * a.out_columns;
  const auto channel = [&](int v) {
    int c = first_channel + image;
    if (ChannelsLast) a.channels(walked + v, c);
    return c;
  };
  const int64_t image_in = image * a.in_plane + in_column, image_out = image * a.out_plane + column;
  if (Gradient) launch_dependents();

  const bool reversed = Gradient != up;  // Row m of the window, the latest M, meets tap m - (M - K), in reversed order if the march is transposed or upwards, but not if both.
  float taps[M][Vw], dots[M][Vw], window[M][V], initial[Vw], bias_sum[Vw];
  bool finite = true;
  unsigned char* const mine = shared + threadIdx.x * bytes;
  for (int plane = split; plane < a.planes; plane += a.splits) {
    // Step i meets row in_row + i * row_step, and from i = K - 1 on makes row out_row + (i - K + 1) * row_step.
    int out_row;
    const int n = a.residues(plane, out_row) * (ChannelsLast ? a.images : a.C) + first_channel;
    out_row += band * a.band_rows * d;
    const int rows = max(min(a.band_rows, a.dilation.steps(a.out_rows - out_row)), 0), steps = rows ? rows + K - 1 : 0;
    if (up) out_row += (rows - 1) * d;
    const int in_row = out_row + a.row_shift + (up ? (K - 1) * d : 0);
    const int inside = a.dilation.steps(up ? in_row - a.in_rows + 1 : -in_row), inside_end = a.dilation.steps(up ? in_row + 1 : a.in_rows - in_row);
    const int64_t out_at = n * a.out_plane + int64_t(out_row) * a.out_columns + image_out;
    const T* next_in = in + (n * a.in_plane + int64_t(in_row) * a.in_columns + image_in);
    const T* next_x = Gradient ? x + (out_at - (K - 1) * out_step) : x;
    const auto fetch = [&](int i, int slot) {
      copy_async<bytes>(mine + slot * slot_bytes, next_in, reached && uint32_t(i - inside) < uint32_t(inside_end - inside) ? bytes : 0), next_in += in_step;
      if (Gradient)
        copy_async<bytes>(mine + slot * slot_bytes + march_threads * bytes, next_x, owned && a.has_dots && i >= K - 1 && i < steps ? bytes : 0), next_x += out_step;
      end_group_of_copies();
    };
#pragma unroll 1
    for (int i = 0; i < slots - 1; ++i) fetch(i, i);
    if (plane == split) {  // while the first copies are under way
      if (ChannelsLast && weight && busy && K == M && a.C % V == 0 && reinterpret_cast<uintptr_t>(weight) % bytes == 0) {  // by vectors
        Packed<T, V> raw[M];
#pragma unroll
        for (int m = 0; m < M; ++m) raw[m] = load<V>(weight + channel(0) * M + m * V);
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
          for (int v = 0; v < Vw; ++v) {
            const int i = v * M + m, j = v * M + M - 1 - m;
            taps[m][v] = widen(reversed ? raw[j / V].at[j % V] : raw[i / V].at[i % V]);
          }
      } else {
#pragma unroll
        for (int v = 0; v < Vw; ++v)
#pragma unroll
          for (int m = 0; m < M; ++m) taps[m][v] = weight && busy && m >= M - K ? widen(weight[channel(v) * K + (reversed ? M - 1 - m : m - (M - K))]) : 0;
      }
#pragma unroll
      for (int v = 0; v < Vw; ++v) {
        initial[v] = !Gradient && bias && busy ? widen(bias[channel(v)]) : 0, bias_sum[v] = 0;
#pragma unroll
        for (int m = 0; m < M; ++m) dots[m][v] = 0, finite = finite && isfinite(taps[m][v]);
      }
#pragma unroll
      for (int i = 0; !optional && i < M * V; ++i) window[i / V][i % V] = 0;
    }
    // Rows of grad_output that count here: all of the first band, later the K - 1 rows above are another's.
    const int bias_begin = band == 0 || up ? 0 : K - 1, bias_end = band == 0 || !up ? steps : rows;
    T* to = out + out_at;
    float spoiled = 0;  // by an infinity or NaN, maybe
    int half = 0;  // of slots
    for (int i = 0; steps;) {
#pragma unroll
      for (int u = 0; u < M; ++u) {
        await_copies<slots - 2>();
        const unsigned char* const slot = mine + (half + u) * slot_bytes;
        float own[V];
        unpack(window[u], at<Packed<T, V>>(slot));
        if (Gradient) unpack(own, at<Packed<T, V>>(slot + march_threads * bytes));
        fetch(i + slots - 1, u ? half + u - 1 : (half ? half : slots) - 1);
        if (Gradient && i >= bias_begin && i < bias_end) {
#pragma unroll
          for (int v = 0; v < V; ++v) bias_sum[v % Vw] += window[u][v];
        }
        if (i >= K - 1) {
          float acc[V];
#pragma unroll
          for (int v = 0; v < V; ++v) acc[v] = initial[v % Vw];
#pragma unroll
          for (int m = 0; m < M; ++m) {
            if (m < optional && m < M - K) continue;
#pragma unroll
            for (int v = 0; v < V; ++v) {
              acc[v] += taps[m][v % Vw] * window[(u + 1 + m) % M][v];
              if (Gradient) dots[m][v % Vw] += own[v] * window[(u + 1 + m) % M][v];
            }
          }
#pragma unroll
          for (int v = 0; v < V; ++v) spoiled += optional ? 0 : acc[v] * 0;
          if (owned && out) store<V>(to, pack<T, V>(acc));
          to += out_step;
        }
        if (++i == steps) goto marched;
      }
      if (slots > M) half = M - half;
    }
  marched:
    await_copies<0>();  // before others to the same place

    if (!(finite && spoiled == 0) && owned && out)
      for (int r = 0; r < rows; ++r)
        for (int v = 0; v < V; ++v) {
          const int c = channel(v);
          float sum = !Gradient && bias ? widen(bias[c]) : 0;
          for (int k = 0; k < K; ++k) {
            const int row = out_row + r * row_step + a.row_shift + k * d;
            if (reached && row >= 0 && row < a.in_rows)
              sum += widen(weight[c * K + (Gradient ? K - 1 - k : k)]) * widen(in[n * a.in_plane + int64_t(row) * a.in_columns + image_in + v]);
          }
          out[out_at + r * out_step + v] = narrow<T>(sum);
        }
  }

  if (Gradient && partial) {
    __syncthreads();
    constexpr int pitch = sums_pitch(march_threads, Vw);
    float* const sums = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int m = -1; m < M; ++m)
      if (m < 0 || m >= M - K)
        store<Vw>(sums + (m < 0 ? K : reversed ? M - 1 - m : m - (M - K)) * pitch + threadIdx.x * Vw, reinterpret_cast<Packed<float, Vw>&>(m < 0 ? bias_sum : dots[m]));
    // Contiguous: of each plane side by side, or of a part of one.
    const int each = a.group_tiles.divisor > 1 ? march_threads : a.row.divisor / V;
    const int columns = ChannelsLast ? march_threads * V : each * a.images, channels = ChannelsLast ? min(a.C, columns) : a.images;
    sum_threads<ChannelsLast>(a, sums, K + 1, pitch, columns, channels, partial, [&](int first, int& c) {
      c = first_channel + first / each;
      const int pixel = ChannelsLast ? a.channels(first_column + first, c) : 0, whole = !ChannelsLast || channels == a.C;
      return c < a.C && (whole || first_column + first < a.columns) ? ((whole ? tile : pixel) * int(a.bands.divisor) + band) * a.splits + split : -1;
    });
  }
#endif
}

// How a launch takes low planes.
struct Low : Pass {
  Divisor width, slices;  // a block keeps its slice of channels, V for each of a warp's lanes; its warps are dealt columns
  int columns, splits;    // columns of all planes; blocks of a slice
};

// For channels_last planes of up to R rows, as many of in as of out, whose row i meets row r where |i - r| <= M / 2: a thread takes a column
// of V channels whole. Reads in (and x if Gradient) once, writes out once. Where an infinity or NaN meets a zero, out is made anew from the
// definition, and the gradient of the weight by `reduce`. Registers: the rows of in, out and x, of low planes also those of in and x of the
// next column, which are under way, the taps, and if Gradient their sums and that of grad_output.
constexpr int low_threads = 128;
constexpr int low_blocks(int R, int M, bool gradient) { return M == 31 ? gradient ? 2 : 4 : R == 7 ? M == 7 ? 5 : 4 : gradient ? M == 7 ? 5 : 4 : M == 7 ? 8 : 6; }  // of a multiprocessor, for which registers have room
template <class T, int V, int R, int M, bool Gradient>
__global__ void __launch_bounds__(low_threads, low_blocks(R, M, Gradient))
low(const __grid_constant__ Low a, const T* __restrict__ in, const T* __restrict__ x, const T* __restrict__ weight, const T* __restrict__ bias,
    T* __restrict__ out, float* __restrict__ partial) {
  constexpr int warps = low_threads / 32;
  constexpr bool ahead = R == 7;
  extern __shared__ __align__(128) unsigned char shared[];
  const int K = a.K, rows = a.in_rows;
  int slice;
  const int split = a.slices(blockIdx.x, slice), first_channel = slice * 32 * V, c = first_channel + threadIdx.x % 32 * V;
  const bool busy = c < a.C;
  const auto place = [&](int column) {
    int w;
    const int n = a.width(column, w);
    return n * a.out_plane + (w * a.C + c);
  };
  if (Gradient) launch_dependents();
  using Words = Packed<uint32_t, V * sizeof(T) / 4>;  // else the compiler would keep 16-bit numbers apart
  Words next_in[R] = {}, next_x[R] = {};
  const auto load_words = [](const T* at) { return load<V * sizeof(T) / 4>(reinterpret_cast<const uint32_t*>(at)); };
  const auto fetch_column = [&](int column) {
    if (!(busy && column < a.columns)) return;
    const T *const from = in + place(column), *const from_x = x + place(column);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const bool inside = R == 7 || r < rows;
      next_in[r] = inside ? load_words(from + r * a.out_columns) : Words{};
      if (Gradient) next_x[r] = inside && a.has_dots ? load_words(from_x + r * a.out_columns) : Words{};
    }
  };
  int column = split * warps + threadIdx.x / 32;
  if (ahead) fetch_column(column);
  float taps[M][V], dots[M][V] = {}, initial[V], bias_sum[V] = {};
#pragma unroll
  for (int v = 0; v < V; ++v) initial[v] = !Gradient && bias && busy ? widen(bias[c + v]) : 0;
  a.each_tap<M, all_distances(R, M)>(-(M / 2), [&](int m, int k) {
    const int tap = max(k, 0);  // loads that wait for no condition are all under way at once
#pragma unroll
    for (int v = 0; v < V; ++v) taps[m][v] = weight && busy ? widen(weight[(c + v) * K + (Gradient ? K - 1 - tap : tap)]) : 0, taps[m][v] = k < 0 ? 0 : taps[m][v];
  });
  for (; column < a.columns; column += a.splits * warps) {
    if (!ahead) fetch_column(column);
    float numbers[R][V], sum = 0;
    Words x_rows[R];
#pragma unroll
    for (int r = 0; r < R; ++r) unpack(numbers[r], reinterpret_cast<const Packed<T, V>&>(next_in[r])), x_rows[r] = next_x[r];
    if (ahead) fetch_column(column + a.splits * warps);
    const int64_t at = place(column);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (R > 7 && r >= rows) continue;
      float acc[V], own[V];
      if (Gradient) unpack(own, reinterpret_cast<const Packed<T, V>&>(x_rows[r]));
#pragma unroll
      for (int v = 0; v < V; ++v) acc[v] = initial[v], bias_sum[v] += Gradient ? numbers[r][v] : 0;
#pragma unroll
      for (int m = 0; m < M; ++m) {
        const int i = r + m - M / 2;
        if (i < 0 || i >= R) continue;
#pragma unroll
        for (int v = 0; v < V; ++v) {
          acc[v] += taps[m][v] * numbers[i][v];
          if (Gradient) dots[m][v] += own[v] * numbers[i][v];
        }
      }
#pragma unroll
      for (int v = 0; v < V; ++v) sum += acc[v];
      if (out && busy) store<V>(out + (at + r * a.out_columns), pack<T, V>(acc));
    }
    if (sum - sum != 0 && out && busy) {
#pragma unroll 1
      for (int i = 0; i < rows * V; ++i) {
        const int r = i / V, v = i % V;
        sum = !Gradient && bias ? widen(bias[c + v]) : 0;
#pragma unroll 1
        for (int k = 0; k < K; ++k)
          if (const int row = r + k * int(a.dilation.divisor) + a.row_shift; row >= 0 && row < rows) sum += widen(weight[(c + v) * K + (Gradient ? K - 1 - k : k)]) * widen(in[at + row * a.out_columns + v]);
        out[at + r * a.out_columns + v] = narrow<T>(sum);
      }
    }
  }
  if (Gradient && partial) {
    float* const sums = reinterpret_cast<float*>(shared);
    for (int k = 0; all_distances(R, M) && k < K; ++k) store<V>(sums + k * sums_pitch(low_threads, V) + threadIdx.x * V, Packed<float, V>{});  // taps that meet no row
    const auto put = [&](int k, float (&sum)[V]) { store<V>(sums + k * sums_pitch(low_threads, V) + threadIdx.x * V, reinterpret_cast<Packed<float, V>&>(sum)); };
    a.each_tap<M, all_distances(R, M)>(-(M / 2), [&](int m, int k) {
      if (k >= 0) put(K - 1 - k, dots[m]);
    });
    put(K, bias_sum);
    sum_threads<true>(a, sums, K + 1, sums_pitch(low_threads, V), low_threads * V, 32 * V, partial, [&](int first, int& c) { return (c = first_channel + first) < a.C ? split : -1; });
  }
}

// d += a b for fragments of 16 x 16 and 16 x 8 numbers.
template <class T> __device__ void multiply_add(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, f16>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#endif
}

// The larger of each of a word's numbers; NaN if one is NaN.
template <class T> __device__ uint32_t max_nan(uint32_t a, uint32_t b) {
#if __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, float>) asm("max.NaN.f32 %0, %0, %1;" : "+r"(a) : "r"(b));
  else if constexpr (std::is_same_v<T, f16>) asm("max.NaN.f16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
  else asm("max.NaN.bf16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
#endif
  return a;
}

constexpr int step = 32, strip_bytes = 128;
template <class T> constexpr int strip = strip_bytes / sizeof(T);
constexpr int pixels = 8, last_pitch = 4 * strip_bytes;  // of a strip in channels_last; of rows in shared memory, of up to 4 strips
constexpr int gap = strip_bytes;  // zeros around 32 rows of an unaligned line
// Where a byte of a row of an aligned strip lies: the 8 granules of 16 bytes of a row are permuted.
inline __device__ int swizzled(int row, int byte) { return row * strip_bytes + (byte ^ row % 8 * 16); }
constexpr int resident_blocks(bool gradient, bool aligned) { return gradient ? 2 : aligned ? 4 : 3; }  // of 4 warps a multiprocessor, by registers

__host__ __device__ constexpr int tap_pairs(int tiles) { return 16 * tiles + 16; }  // places where pairs begin, in zeros around the taps

struct Toeplitz : Pass {
  int tiles;
  const void *in_end, *x_end;            // of the tensors
  int64_t in_row, out_row;               // numbers from a row to the next of its residue class, in channels_last
  int column_begin;                      // where the first line begins in out
  int line_strips, line_columns;         // of a line
  Divisor plane_lines;
  int lines;                             // of all planes of a channel
  Divisor bands, residues;               // of a line
  int sets, groups, side;                // a block keeps one of the sets of channels: one, or `groups` times 8; it has `side` lines of each
  int band_steps, units, splits;         // unit: a band of `side` lines; a set's are dealt to `splits` blocks
  Divisor row_granules;                  // of 16 bytes, of a line's columns
  bool whole;                            // unaligned lines: all of a plane's columns, and rows follow one another
  int modulus;                           // of unaligned rows' addresses in shared and global memory, which are congruent
  int in_pitch, out_pitch;               // of rows in shared memory, in bytes
  int pixel_granules;                    // of 16 bytes, from a pixel to the next in shared memory, in channels_last
  int outs;                              // warps of a strip for out, in channels_last
  int ring_pairs, x_slots, pair_bytes, x_offset, dots_offset, out_offset, rows_offset, taps_offset, line_bytes;  // of a line's shared memory, in channels_last a block's
};

// A band of a line: plane (an image if channels_last), first row and column in out, steps and rows. Mixed: a block's units are of all bands,
// for the last one is shorter.
struct Band { int n, row, column, steps, rows; bool busy; };
template <bool mixed> __device__ Band band(const Toeplitz& a, int unit, int own_line) {
  Band of;
  int residue, index, of_plane;
  const int group = a.bands(unit, index), line = a.residues(group, residue) * a.side + own_line;
  if (mixed) a.bands(index + group, index);
  of.n = a.plane_lines(line, of_plane), of.column = a.column_begin + of_plane * a.line_columns, of.busy = line < a.lines;
  of.row = residue + index * a.band_steps * step * int(a.dilation.divisor), of.rows = a.dilation.steps(a.out_rows - of.row);
  of.steps = min(a.band_steps, (of.rows + step - 1) / step);
  return of;
}
template <bool mixed> __device__ int next_steps(const Toeplitz& a, int& unit) {  // of the next unit that has some
  int steps = 0;
  while (steps <= 0 && (unit += a.splits) < a.units) steps = band<mixed>(a, unit, 0).steps;
  return steps;
}

// The taps of a channel as a banded Toeplitz matrix on tensor cores, for contiguous layout at stride 1.
// Block b of 16 rows of out is sum_t A_t In_{b+t}, with A_t[r][c] = tap[16 t + c - r] and In_i the i-th 16 rows of in, t < tiles.
// Forward: out is y, in is x. Transposed (input gradient): out is grad_input, in is grad_output, taps are reversed. The weight
// gradient comes from the same blocks: of D_t = X_b In_{b+t}^T, summed over all b, diagonal c - r is tap 16 t + c - r.
// Rows of one residue class modulo the dilation form a plane of their own.
//
// A warp has a strip of 128 bytes of rows of out, which is walked in steps of 32 rows; a line is a strip or, unaligned, some side by side.
// A block takes units: bands of lines. In shared memory: the taps, of each line a ring of pairs of blocks of `in` that a step needs and of
// the one under way, and 32 rows of x, of each warp the D_t. In registers: out's two blocks and x's. All blocks are read from the ring
// once a step, so registers do not depend on the number of taps. Written are out, each number once, and a block's sums of D_t and of
// grad_output (`partial`), which `reduce` adds up in fixed order.
//
// Columns can be dealt to the fragments at will: a lane gets contiguous columns of in and of out. A warp's copies are requests of 128
// bytes to L2 only if each such line of global memory goes to one line of shared memory, else of 16 to 64: so rows take whole lines,
// and their granules of 16 bytes are permuted within them, which keeps all this free of bank conflicts.
//
// Unaligned, rows lie in shared memory as they do in global memory, modulo 16 bytes; lines that are all of a plane's columns (`whole`) are
// stretches of memory, copied as such, and lie there as they do modulo 128 bytes, or 64 where 32 rows are no multiple of 128. Rows of out
// are put together where the step's first rows of in were. Strips meet what follows the ends of their rows: other rows, or the zeros of
// a gap. That is left out of sums and not stored.
//
// Barriers: before a copy, all have read what it replaces; after the wait, all copies have landed, as each warp copies rows for all.
// They also keep warps in step, so that these read longer stretches of memory.
//
// Zeros of A_t beyond the band times an infinity are NaN: where a result is NaN, it is computed again from the definition.
//
// A float is split into the sum of three bfloat16, and a product into the six of parts that matter (after Henry, Tang and Heinecke,
// 2019). Tensor cores cut sums off instead of rounding them: each tile's products are summed apart, the smallest first, and rounded
// as they are added to the others. (Numbers below 2^-110 lose bits: the last part is below the range.) Strips have half the columns,
// and rows are always aligned.
template <class T> using Factor = std::conditional_t<std::is_same_v<T, float>, bf16, T>;
template <class T> constexpr int parts = std::is_same_v<T, float> ? 3 : 1;

// d += a b for N fragments b; a and b by parts, then by halves of what is summed over; a's also by halves of its rows.
template <class T, int N, int A, int B> __device__ void multiply_add(float (*d)[4], const uint32_t (&a)[A][2][2], const uint32_t (&b)[B][N][2]) {
  float products[N][4] = {};
#pragma unroll
  for (int sum = B - 1; sum >= 0; --sum) {
#pragma unroll
    for (int i = 0; i <= sum && i < A; ++i) {
#pragma unroll
      for (int n = 0; n < N; ++n) multiply_add<T>(B > 1 ? products[n] : d[n], a[i][0][0], a[i][0][1], a[i][1][0], a[i][1][1], b[sum - i][n][0], b[sum - i][n][1]);
    }
  }
  if constexpr (B > 1) {
#pragma unroll
    for (int i = 0; i < 4 * N; ++i) d[i / 4][i % 4] += products[i / 4][i % 4];
  }
}

// The parts of two floats, in pairs.
struct Parts { uint32_t at[3]; };
inline __device__ Parts to_parts(float v, float w) {
  Parts to;
#pragma unroll
  for (int p = 0; p < 3; ++p) {
    to.at[p] = narrow_pair<bf16>(v, w);
    v -= __uint_as_float(to.at[p] << 16), w -= __uint_as_float(to.at[p] & 0xffff0000);
  }
  return to;
}

// Two times two 8 x 8 numbers of rows in shared memory as fragments: rows `row` of 16 and columns `column` of 8 by lane.
inline __device__ void load_fragments(uint32_t (&to)[4], const unsigned char* from) {
#if __CUDA_ARCH__ >= 800
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(uint32_t(__cvta_generic_to_shared(from))) : "memory");
#endif
}

// Starts to copy 32 rows of aligned strips, `row_bytes` apart; zeros for rows outside [lo, hi) and to the right of byte `end` of a row.
// The lines' warps share the rows of all.
inline __device__ void copy_pair(unsigned char* to, const char* from, int64_t row_bytes, int lo, int hi, int end, int line, int lines) {
  const int lane = threadIdx.x % 32, rows = 4 / lines, offset = lane % 8 * 16, first = line * 2 * rows + lane / 8 / lines;
  from += first * row_bytes + offset;
  const auto copy = [&]<bool inside> {
#pragma unroll
    for (int i = 0; i < 8; ++i, from += i % 2 ? rows * row_bytes : (8 - rows) * row_bytes) {
      const int r = first + i % 2 * rows, row = r + i / 2 * 8;  // r < 8, which the compiler does not know of `swizzled`
      unsigned char* const at = to + row * strip_bytes + (offset ^ r * 16);
      if (inside || (row >= lo && row < hi && offset < end)) copy_async(at, from, 16);
      else *reinterpret_cast<uint4*>(at) = make_uint4(0, 0, 0, 0);
    }
  };
  lo <= 0 && hi >= step && offset < end ? copy.template operator()<true>() : copy.template operator()<false>();
}

// 32 rows of an unaligned line lie in shared memory as they do in global memory modulo 16 bytes, or if `whole` all of them as one row, for
// they follow one another. Calls f for every four of the thread's granules of 16 bytes, with what calls body(row, byte of the row) for the i-th.
template <bool whole, class F> __device__ void each_granule(const Toeplitz& a, int pitch, int thread, const F& f) {
  const int threads = 32 * a.line_strips, n = whole ? step * pitch / 16 + 1 : step * threads / 4;
  int granule, row = a.row_granules(thread, granule);
#pragma unroll 1
  for (int first = thread; first < n; first += 4 * threads, row += 16) {
    f([&](int i, const auto& body) {
      if (!whole) body(row + 4 * i, granule * 16);
      else if (first + i * threads < n) body(0, (first + i * threads) * 16);
    });
  }
}

// Starts to copy 32 rows of an unaligned line; zeros for rows outside [lo, hi). Numbers at the ends of a plane or a tensor [begin, limit) are
// copied one by one.
inline __device__ void copy_line(const Toeplitz& a, unsigned char* to, int pitch, const char* from, int64_t row_bytes, int lo, int hi, const char* begin, const char* limit, int thread) {
  const int skipped = reinterpret_cast<uintptr_t>(from) & (a.modulus - 1);
  to += skipped;
  const auto copy = [&]<bool whole, bool inside> {
    const auto one = [&](int row, int byte) {
      byte -= row * pitch + skipped & 15;
      const char* const p = from + (row * row_bytes + byte);
      unsigned char* const q = to + row * pitch + byte;
      if (inside) return copy_async(q, p, 16);
      // what there is, in bytes from p
      const int first = whole ? lo * pitch - byte : row >= lo ? 0 : 16, last = whole ? hi * pitch - byte : row < hi ? 16 : 0;
      if (first >= 16 || last <= 0) *reinterpret_cast<uint4*>(q) = make_uint4(0, 0, 0, 0);
      else if ((lo == 0 || first <= 0) && last >= 16 && p >= begin && p + 16 <= limit) copy_async(q, p, 16);
      else {
#pragma unroll 1
        for (int b = 0; b < 16; b += 2) *reinterpret_cast<uint16_t*>(q + b) = b >= first && b < last && p + b >= begin && p + b < limit ? *reinterpret_cast<const uint16_t*>(p + b) : 0;
      }
    };
    each_granule<whole>(a, pitch, thread, [&](const auto& granule) {
#pragma unroll(inside ? 4 : 1)
      for (int i = 0; i < 4; ++i) granule(i, one);
    });
    if (!whole && thread < step) one(thread, a.line_columns * 2);
  };
  const bool inside = lo <= 0 && hi >= step && (a.whole || from - 16 >= begin) && from + (step * row_bytes + a.line_columns * 2 + 32) <= limit;
  lo = min(max(lo, 0), step), hi = min(max(hi, 0), step + 1);
  if (a.whole) inside ? copy.template operator()<true, true>() : copy.template operator()<true, false>();
  else inside ? copy.template operator()<false, true>() : copy.template operator()<false, false>();
}

// Stores `rows` rows of an unaligned line, bytes [begin, end) of each.
inline __device__ void store_line(const Toeplitz& a, const unsigned char* from, int pitch, char* to, int64_t row_bytes, int rows, int begin, int end, int thread) {
  const int skipped = reinterpret_cast<uintptr_t>(to) & (a.modulus - 1);
  from += skipped;
  if (a.whole) begin = 0, end = rows * pitch, rows = rows > 0;
  const auto ahead = [&](int row) { return -(row * pitch + skipped + begin) & 15; };  // of its first whole granule
  const auto four = [&](const auto& granule) {
    uint4 v[4];
    char* at[4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i)
      granule(i, [&](int row, int byte) {
        byte += begin + ahead(row);
        if (row < rows && byte + 16 <= end) v[i] = *reinterpret_cast<const uint4*>(from + row * pitch + byte), at[i] = to + (row * row_bytes + byte);
      });
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (at[i]) store_16(at[i], v[i]);
  };
  a.whole ? each_granule<true>(a, pitch, thread, four) : each_granule<false>(a, pitch, thread, four);
#pragma unroll 1
  for (int i = thread; i < rows * 16; i += 32 * a.line_strips) {  // what is left at the ends
    const int row = i / 16, first = min(begin + ahead(row), end), last = max(end - (row * pitch + skipped + end & 15), first), byte = i % 8 * 2 + (i % 16 < 8 ? begin : last);
    if (byte < (i % 16 < 8 ? first : end)) *reinterpret_cast<uint16_t*>(to + (row * row_bytes + byte)) = *reinterpret_cast<const uint16_t*>(from + row * pitch + byte);
  }
}

// 2 N numbers of 16 bits by words, from an address on that is `odd`, 0 or 2, modulo 4.
template <int N> __device__ void load_pairs(uint32_t (&to)[N], const unsigned char* from, int odd) {
  from -= odd;
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = at<uint32_t>(from + 4 * i);
  const uint32_t end = odd ? at<uint32_t>(from + 4 * N) : 0;
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = __funnelshift_r(to[i], i + 1 < N ? to[i + 1] : end, odd * 8);
}

// A block's rows as the left or the right factor of a product over columns: fragments of 16 columns each, in an order that is the same for
// all rows. The tensor cores take a left one's quarters in another order; in the wrong one, registers are moved for each product. Unaligned:
// the first begins at `phase` modulo 4; zeros outside columns [first, last). (Unrolled loops behind `if constexpr` are in braces: without,
// nvcc 13.0 drops the loop and says nothing.)
template <class T, bool Aligned, bool left>
__device__ void load_rows(uint32_t (&to)[strip<T> / 16][parts<T>][2][2], const unsigned char* block, int pitch, int phase = 0, int first = 0, int last = strip<T>) {
  const int lane = threadIdx.x % 32;
  if constexpr (std::is_same_v<T, float>) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t raw[4];  // columns q, q + 4, q + 8 and q + 12 of row g
      load_fragments(raw, block + swizzled(lane % 8, lane / 8 * 16 + i / 2 * 64) + i % 2 * 8 * strip_bytes);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const Parts v = to_parts(__uint_as_float(raw[2 * k]), __uint_as_float(raw[2 * k + 1]));
#pragma unroll
        for (int p = 0; p < 3; ++p) to[i / 2][p][left ? k : i % 2][left ? i % 2 : k] = v.at[p];
      }
    }
  } else if constexpr (Aligned) {
    block += (left ? lane / 8 % 2 : lane / 16) * 8 * strip_bytes;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t raw[4];
      load_fragments(raw, block + swizzled(lane % 8, (left ? lane / 16 : lane / 8 % 2) * 16 + i * 32));
#pragma unroll
      for (int j = 0; j < 4; ++j) to[i][0][j / 2][j % 2] = raw[j];
    }
  } else {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      uint32_t words[8];
      load_pairs(words, block + (h * 8 + lane / 4) * pitch + lane % 4 * 32, phase + lane / 4 * pitch & 2);
#pragma unroll
      for (int i = 0; i < 8; ++i) to[i / 2][0][left ? i % 2 : h][left ? h : i % 2] = words[i];
    }
    if (first > 0 || last < strip<T>) {
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const int column = lane % 4 * 16 + i % 8 * 2;
        to[i % 8 / 2][0][left ? i % 2 : i / 8][left ? i / 8 : i % 2] &= (column >= first && column < last ? 0xffff : 0) | (column + 1 >= first && column + 1 < last ? 0xffff0000 : 0);
      }
    }
  }
}

// 32 rows of a strip from the definition.
template <class T>
__device__ __noinline__ void redo(const Toeplitz& a, const T* in, const T* weight, float bias, T* out, int n, int c, int first_row, int first_column) {
  const int d = a.dilation.divisor;
  const int64_t plane = int64_t(n) * a.C + c;
  in += plane * a.in_plane, weight += int64_t(c) * a.K, out += plane * a.out_plane;
  for (int i = threadIdx.x % 32; i < step * strip<T>; i += 32) {
    const int row = first_row + i / strip<T> * d, column = first_column + i % strip<T>, in_column = column + a.column_shift;
    if (row >= a.out_rows) continue;
    if (column < 0 || column >= a.out_width) continue;
    float sum = bias;
#pragma unroll 1
    for (int k = 0; k < a.K; ++k) {
      const int in_row = row + a.row_shift + k * d;
      if (in_column >= 0 && in_column < a.in_width && in_row >= 0 && in_row < a.in_rows)
        sum += widen(weight[a.reversed ? a.K - 1 - k : k]) * widen(in[int64_t(in_row) * a.in_width + in_column]);
    }
    out[int64_t(row) * a.out_width + column] = narrow<T>(sum);
  }
}

// Unaligned: lines of up to 8 strips; the bound is what leaves registers for the blocks of `resident_blocks`. Split: a line has two warps,
// the first for out, the second for the copies and the sums.
template <class T, bool Aligned, bool Gradient, bool Split = false>
__global__ void __launch_bounds__(Aligned ? 128 : Gradient ? 256 : 384, Aligned ? resident_blocks(Gradient, Aligned) : 1)
toeplitz(const __grid_constant__ Toeplitz a, const T* __restrict__ in, const T* __restrict__ x, const T* __restrict__ weight,
         const T* __restrict__ bias, T* __restrict__ out, float* __restrict__ partial) {
  constexpr int J = Aligned ? 8 / sizeof(T) : 8;  // contiguous columns of in that a lane loads; of out it gets 2 J
  constexpr int N = strip<T> / 8, P = parts<T>, per_word = 4 / sizeof(T), words = 2 * J / per_word;
  extern __shared__ __align__(128) unsigned char shared[];
  const int lane = threadIdx.x % 32, warp = __shfl_sync(~0u, threadIdx.x / 32, 0), warps = blockDim.x / 32, q = lane % 4, g = lane / 4;
  const int split = blockIdx.x / a.C, c = blockIdx.x % a.C, d = a.dilation.divisor, tiles = a.tiles;
  const int in_pitch = Aligned ? strip_bytes : a.in_pitch, out_pitch = Aligned ? strip_bytes : a.out_pitch, pair_bytes = Aligned ? step * strip_bytes : a.pair_bytes;
  const int lines = warps / (Split ? 2 : Aligned ? 1 : a.line_strips);
  const bool second = Split && warp >= lines, copies_and_sums = !Split || second;
  const int line = Aligned ? warp - (second ? lines : 0) : warp / a.line_strips, own_strip = Aligned ? 0 : warp - line * a.line_strips, own_columns = own_strip * strip<T>;

  const int table_bytes = tap_pairs(tiles) * 8;  // of each part
  unsigned char* const mine = shared + P * table_bytes + line * a.line_bytes;
  unsigned char* const ring = mine + (Aligned ? 0 : gap);
  float4* const dots = reinterpret_cast<float4*>(mine + a.dots_offset) + own_strip * tiles * 64;

  const auto place = [&](int n, int64_t plane, int width, int row, int column) { return (int64_t(n) * a.C + c) * plane + int64_t(row) * width + column; };
  const bool whole = !Aligned && a.whole;
  const auto first_in = [&](const Band& of) { return whole ? 0 : of.column + a.column_shift; };  // columns of in and out where a line's memory begins
  const auto first_out = [&](const Band& of) { return whole ? 0 : of.column; };
  const auto place_in = [&](const Band& of) { return in + place(of.n, a.in_plane, a.in_width, of.row + a.row_shift, first_in(of)); };
  const auto place_x = [&](const Band& of) { return x + place(of.n, a.out_plane, a.out_width, of.row, first_out(of)); };
  const auto skipped = [&](const T* at) { return Aligned ? 0 : int(reinterpret_cast<uintptr_t>(at) & (a.modulus - 1)); };
  const int lead = tiles / 2;  // pairs before the one that completes a step's

  // Copies the next pair of `in`, the `pair`-th of steps + lead of its unit, or the rows of x of the step that it completes. Where
  // registers allow, where rows lie is worked out once a unit.
  constexpr bool keeps_rows = Gradient || P > 1 || !Aligned;
  const int line_threads = Aligned ? 32 : 32 * a.line_strips, line_thread = int(threadIdx.x) - line * line_threads;
  struct Rows { const char* at; int to, lo, hi, end; };
  Rows in_rows, x_rows;
  int fetched_unit = split - a.splits, pair = 0, pairs = 0, slot = 0;
  const auto fetch = [&]<bool of_x> {
    if (!of_x && pair++ == pairs) {
      const int steps = next_steps<!Aligned>(a, fetched_unit);
      pairs = steps > 0 ? steps + lead : 0, pair = steps > 0;
    }
    const int first = pair - 1 - (of_x ? lead : 0);
    if (pair > 0 && first >= 0 && (!of_x || a.has_dots)) {
      Rows& rows = of_x ? x_rows : in_rows;
      const int width = of_x ? a.out_width : a.in_width;
      const int64_t row_bytes = int64_t(d) * width * sizeof(T);
      if (first == 0 || !keeps_rows) {
        const int copied = Aligned ? lane / 8 % lines : line;
        const Band of = band<!Aligned>(a, fetched_unit, copied);
        const T* const at = of_x ? place_x(of) : place_in(of);
        const int row = of_x ? of.row : of.row + a.row_shift, column = of_x ? first_out(of) : first_in(of);
        rows.at = reinterpret_cast<const char*>(at) + first * step * row_bytes, rows.to = (copied - line) * a.line_bytes;
        rows.lo = a.dilation.steps(-row) - first * step, rows.hi = of.busy ? a.dilation.steps((of_x ? a.out_rows : a.in_rows) - row) - first * step : 0;
        rows.end = (width - column) * int(sizeof(T));
      }
      unsigned char* const to = of_x ? mine + rows.to + a.x_offset : ring + rows.to + slot * pair_bytes;
      if constexpr (Aligned) {
        if (copies_and_sums) copy_pair(to, rows.at, row_bytes, rows.lo, rows.hi, rows.end, line, lines);
      } else copy_line(a, to, of_x ? out_pitch : in_pitch, rows.at, row_bytes, rows.lo, rows.hi, reinterpret_cast<const char*>(of_x ? x : in), static_cast<const char*>(of_x ? a.x_end : a.in_end), line_thread);
      rows.at += step * row_bytes, rows.lo -= step, rows.hi -= step;
    }
    if (!of_x) slot = slot + 1 == a.ring_pairs ? 0 : slot + 1;
    end_group_of_copies();
  };
  const auto fetch_in = [&] { fetch.template operator()<false>(); };
  const auto fetch_x = [&] { if constexpr (Gradient) fetch.template operator()<true>(); };
  if constexpr (!Aligned) {  // what columns beyond the rows' ends meet: a gap, and what rows leave of 128 bytes on both sides of it
    constexpr int granules = 4 * gap / 16;
    for (int i = line_thread; i < granules * (a.ring_pairs + 2); i += line_threads) {
      const int n = i / granules, byte = i % granules * 16 - 2 * gap;
      if ((n > 0 || byte >= 0) && (n < a.ring_pairs + a.has_dots || byte < gap))
        *reinterpret_cast<uint4*>(mine + (n <= a.ring_pairs ? n * pair_bytes : a.dots_offset - gap) + byte) = make_uint4(0, 0, 0, 0);
    }
    __syncthreads();
  }
  const int early = Gradient ? lead : 0;  // steps before a unit's first one, whose pairs are under way before all else; forward, that is slower
#pragma unroll 1
  for (int i = 0; i <= early; ++i) fetch_in(), fetch_x();
  if (Gradient) launch_dependents();
  // Taps k and k + 1, k - 8 and k - 7 from k = -8 on: two such words, and those for k + 8, are a lane's of A_t.
  for (int i = threadIdx.x; i < 4 * tap_pairs(tiles); i += blockDim.x) {
    const int k = i / 4 - 8 + i % 2 - i / 2 % 2 * 8;
    float tap = weight && k >= 0 && k < a.K ? widen(weight[int64_t(c) * a.K + (a.reversed ? a.K - 1 - k : k)]) : 0;
    for (int p = 0; p < P; ++p) tap -= widen(reinterpret_cast<Factor<T>*>(shared + p * table_bytes)[i] = narrow<Factor<T>>(tap));
  }
  const unsigned char* const taps = shared + (8 + 2 * q - g) * 8;
  const float initial = !Gradient && bias ? widen(bias[c]) : 0;
  if (Gradient && a.has_dots && copies_and_sums)
    for (int i = lane; i < tiles * 64; i += 32) dots[i] = make_float4(0, 0, 0, 0);
  __syncthreads();

  float bias_sum[4] = {};
  for (int unit = split - a.splits, s = early - lead; next_steps<!Aligned>(a, unit) > 0; s = -lead) {
    const Band of = band<!Aligned>(a, unit, line);
    const int column = of.column + own_columns, in_column = column + a.column_shift;
    const int in_at = Aligned ? 0 : skipped(place_in(of)) + (in_column - first_in(of)) * int(sizeof(T)), x_at = Aligned || !Gradient ? 0 : skipped(place_x(of)) + (column - first_out(of)) * int(sizeof(T));
    const unsigned char* const ring_end = ring + a.ring_pairs * pair_bytes + in_at;
    for (; s < of.steps; ++s) {
      __syncthreads();
      fetch_in();  // to the slot before that of the step's first pair, which the step before read first
      if (s >= 0) {  // the first pairs of a unit are under way together
        await_copies<1>();
        __syncthreads();
      }
      const unsigned char* block = ring + slot * pair_bytes + in_at;
      uint32_t own[2][strip<T> / 16][P][2][2];
      if (Gradient && a.has_dots && s >= 0) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (copies_and_sums) load_rows<T, Aligned, true>(own[i], mine + a.x_offset + x_at + i * 16 * out_pitch, out_pitch, x_at, max(-column, -in_column), min(a.out_width - column, a.in_width - in_column));
        }
        __syncthreads();
      }
      fetch_x();
      if (s < 0 || (Aligned && !of.busy)) continue;
      float acc[2][N][4];
#pragma unroll
      for (int i = 0; i < 8 * N; ++i) acc[i / (4 * N)][i / 4 % N][i % 4] = initial;
      float upper[2][4], lower[2][4];  // D_u of the step's first block, D_{u-1} of its second
      const auto next_block = [&](int u) {  // u: the one it is
        block += Aligned || u % 2 ? 16 * in_pitch : pair_bytes - 16 * in_pitch;
        if (block >= ring_end) block -= a.ring_pairs * pair_bytes;
      };
      // Block u of in meets A_u for the step's first block of out and A_{u-1} for its second.
      const auto meet = [&]<bool for_out, bool for_dots, bool has_upper, bool has_lower>(int u) {
        uint32_t tap[2][P][2][2];  // A_u, A_{u-1}
#pragma unroll
        for (int i = 0; i < 4 * P; ++i)
          if (i / (2 * P) ? has_lower : has_upper)
            reinterpret_cast<uint2&>(tap[i / (2 * P)][i / 2 % P][i % 2]) = at<uint2>(taps + i / 2 % P * table_bytes + (16 * (u - i / (2 * P)) + i % 2 * 8) * 8);
        if (for_out && (!Gradient || out)) {
#pragma unroll
          for (int n = 0; n < N; n += J) {
            uint32_t b[P][J][2];  // of rows 2 q, 2 q + 1, 2 q + 8, 2 q + 9 of the block
#pragma unroll
            for (int h = 0; h < 2; ++h) {
              const int byte = (n * 8 + g * J) * int(sizeof(T));
              const unsigned char* const from = block + 8 * h * in_pitch + (Aligned ? swizzled(2 * q, byte) : 2 * q * in_pitch + byte);
              const unsigned char* const next = Aligned ? block + 8 * h * in_pitch + swizzled(2 * q + 1, byte) : from + in_pitch;
              if constexpr (P > 1) {
                const float2 v = at<float2>(from), w = at<float2>(next);
                const Parts left = to_parts(v.x, w.x), right = to_parts(v.y, w.y);
#pragma unroll
                for (int p = 0; p < P; ++p) b[p][0][h] = left.at[p], b[p][1][h] = right.at[p];
              } else if constexpr (Aligned) {
                const uint2 v = at<uint2>(from), w = at<uint2>(next);
                b[0][0][h] = __byte_perm(v.x, w.x, 0x5410), b[0][1][h] = __byte_perm(v.x, w.x, 0x7632);
                b[0][2][h] = __byte_perm(v.y, w.y, 0x5410), b[0][3][h] = __byte_perm(v.y, w.y, 0x7632);
              } else {
                uint32_t v[4], w[4];
                load_pairs(v, from, in_at & 2), load_pairs(w, next, in_at + in_pitch & 2);
#pragma unroll
                for (int j = 0; j < J; ++j) b[0][j][h] = __byte_perm(v[j / 2], w[j / 2], j % 2 ? 0x7632 : 0x5410);
              }
            }
            if constexpr (has_upper) multiply_add<T>(acc[0] + n, tap[0], b);
            if constexpr (has_lower) multiply_add<T>(acc[1] + n, tap[1], b);
          }
        }
        if (Gradient && for_dots && a.has_dots) {
          uint32_t other[strip<T> / 16][P][2][2];
          load_rows<T, Aligned, false>(other, block, in_pitch, in_at);
          if constexpr (has_upper) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const float4 v = dots[u * 64 + i * 32 + lane];
              upper[i][0] = v.x, upper[i][1] = v.y, upper[i][2] = v.z, upper[i][3] = v.w;
            }
          }
#pragma unroll
          for (int i = 0; i < strip<T> / 16; ++i) {
            if constexpr (has_upper) multiply_add<T>(upper, own[0][i], other[i]);
            if constexpr (has_lower) multiply_add<T>(lower, own[1][i], other[i]);
          }
          if constexpr (has_lower) {
#pragma unroll
            for (int i = 0; i < 2; ++i) dots[(u - 1) * 64 + i * 32 + lane] = make_float4(lower[i][0], lower[i][1], lower[i][2], lower[i][3]);
          }
#pragma unroll
          for (int i = 0; i < 8; ++i) lower[i / 4][i % 4] = upper[i / 4][i % 4];
        }
      };
      const unsigned char* const first_block = block;
      const auto meet_all = [&]<bool for_out, bool for_dots> {
        meet.template operator()<for_out, for_dots, true, false>(0);
#pragma unroll(Split && P == 1 ? 2 : 1)
        for (int u = 1; u < tiles; ++u) next_block(u), meet.template operator()<for_out, for_dots, true, true>(u);
        next_block(tiles), meet.template operator()<for_out, for_dots, false, true>(tiles);
      };
      if constexpr (!Split) meet_all.template operator()<true, true>();
      else second ? meet_all.template operator()<false, true>() : meet_all.template operator()<true, false>();
      if (Gradient && a.has_bias_sum && copies_and_sums) {  // a block counts where tap 0 meets it, or in the last step
        constexpr uint32_t ones = std::is_same_v<T, f16> ? 0x3c003c00 : 0x3f803f80;
        const int count = (s + 1) * step >= of.rows ? tiles : 1;
        block = first_block;
#pragma unroll 1
        for (int u = 0; u <= count; ++u, next_block(u)) {
          if constexpr (P > 1) {
            float sum = 0;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const float4 v = at<float4>(block + (i * 4 + lane / 8) * in_pitch + lane % 8 * 16);
              sum += v.x + v.y + (v.z + v.w);
            }
            bias_sum[0] += sum;
          } else {
            uint32_t other[4][1][2][2];
            load_rows<T, Aligned, false>(other, block, in_pitch, in_at, -in_column, of.busy ? a.in_width - in_column : 0);
#pragma unroll
            for (int i = 0; i < 8; ++i) multiply_add<T>(bias_sum, ones, ones, ones, ones, other[i / 2][0][i % 2][0], other[i / 2][0][i % 2][1]);
          }
        }
      }
      if ((Gradient && !out) || second) continue;

      const int row = of.row + s * step * d;
      if (!Aligned && (in_column < 0 || min(strip<T>, a.out_width - column) > a.in_width - in_column)) {  // some meet none of in
#pragma unroll
        for (int i = 0; i < 2 * N; ++i)
          if (uint32_t((i / 2 / J * 8 + 2 * q + i % 2) * J + i / 2 % J + in_column) >= uint32_t(a.in_width))
            for (int k = 0; k < 4; ++k) acc[k / 2][i / 2][i % 2 + k % 2 * 2] = initial;
      }
      uint32_t packed[2][2][8], nan = 0;  // of both blocks' upper and lower 8 rows
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        const auto& from = acc[i / 16];
        const int h = i / 8 % 2 * 2, k = i % 8 / words * J, j = i % words * per_word;
        float pair[per_word];
#pragma unroll
        for (int v = 0; v < per_word; ++v) pair[v] = from[k + j % J + v][h + j / J];
        const Packed<T, per_word> word = pack<T>(pair);
        nan = max_nan<T>(nan, packed[i / 16][i / 8 % 2][i % 8] = reinterpret_cast<const uint32_t&>(word));
      }
      const Packed<T, per_word> most = reinterpret_cast<const Packed<T, per_word>&>(nan);
      const bool wrong = __any_sync(~0u, isnan(widen(most.at[0])) || isnan(widen(most.at[per_word - 1])));
      if constexpr (Aligned) {
        if (wrong) {
          redo(a, in, weight, initial, out, of.n, c, row, column);
          continue;
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          T* const to = out + place(of.n, a.out_plane, a.out_width, row + half * 16 * d, column);
          const int rows = of.rows - s * step - half * 16;
#pragma unroll
          for (int h = 0; h < 2; ++h) {
#pragma unroll
            for (int group = 0; group < N / J; ++group) {
              const uint32_t* const v = packed[half][h] + group * words;
              const int r = g + 8 * h, at = (group * 8 + 2 * q) * J;
              if (r < rows && column + at < a.out_width) store_16(to + int64_t(r) * d * a.out_width + at, make_uint4(v[0], v[1], v[2], v[3]));
            }
          }
        }
      } else {
        __syncthreads();
        T* const to = out + place(of.n, a.out_plane, a.out_width, row, first_out(of));
        unsigned char* const staged = ring + slot * pair_bytes;  // where the step's first pair was
        const int own_first = column + 16 * q;
        const uint32_t there = of.busy ? bits(-own_first, a.out_width - own_first) & 0xffff : 0;
        unsigned char* const own_place = staged + skipped(to) + (own_first - first_out(of)) * int(sizeof(T)) + g * out_pitch;
        const int odd = reinterpret_cast<uintptr_t>(own_place) & 2;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          unsigned char* const place = own_place + i * 8 * out_pitch;
          const auto& v = packed[i / 2][i % 2];
          if (there == 0xffff) {
#pragma unroll
            for (int k = 0; k < 7; ++k) *reinterpret_cast<uint32_t*>(place + odd + k * 4) = __funnelshift_r(v[k], v[k + 1], odd * 8);
            if (odd) *reinterpret_cast<uint16_t*>(place) = v[0], *reinterpret_cast<uint16_t*>(place + 30) = v[7] >> 16;
            else *reinterpret_cast<uint32_t*>(place + 28) = v[7];
          } else {
#pragma unroll
            for (int e = 0; e < 16; ++e)
              if (there & 1 << e) *reinterpret_cast<uint16_t*>(place + e * 2) = v[e / 2] >> e % 2 * 16;
          }
        }
        const bool any_wrong = __syncthreads_or(wrong);
        store_line(a, staged, out_pitch, reinterpret_cast<char*>(to), int64_t(d) * a.out_width * sizeof(T), of.busy ? min(of.rows - s * step, step) : 0,
                   max(-of.column, 0) * 2, min(a.out_width - of.column, a.line_columns) * 2, line_thread);
        if (any_wrong) {
          __syncthreads();
          if (wrong && of.busy) redo(a, in, weight, initial, out, of.n, c, row, column);
        }
      }
    }
  }

  if (Gradient) {
    float sum = bias_sum[0] + bias_sum[1];  // of all lanes, or those of a quad, for the quads have the same
    for (int o = P > 1 ? 16 : 2; o; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
    await_copies<0>();
    __syncthreads();
    if (lane == 0 && copies_and_sums) reinterpret_cast<float*>(mine)[own_strip] = sum;
    __syncthreads();
    partial += (int64_t(c) * a.blocks + split) * (a.K + 1);
    const unsigned char* const all = mine - line * a.line_bytes;
    for (int first = warp * 2; first <= a.K; first += warps * 2) {  // half a warp for each
      const int k = first + lane / 16, r = lane % 16, t = (k + r) / 16, column = (k + r) % 16;
      const int from = k == a.K ? 0 : a.dots_offset + 4 * (t * 256 + column / 8 * 128 + (r % 8 * 4 + column % 8 / 2) * 4 + r / 8 * 2 + column % 2);
      float sum = 0;
      if (k < a.K ? a.has_dots : k == a.K && r == 0)
        for (int w = 0; w < (Split ? lines : warps); ++w) {
          const int line = Aligned ? w : w / a.line_strips, strip = w - line * (Aligned ? 1 : a.line_strips);
          sum += at<float>(all + line * a.line_bytes + strip * (k == a.K ? 4 : tiles * 1024) + from);
        }
      for (int o = 8; o; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
      if (r == 0 && k <= a.K) partial[k == a.K ? k : a.K - 1 - k] = sum;
    }
  }
}

// The words made of one number of each of two places, for 8 channels.
inline __device__ void load_two(uint32_t (&to)[8], const unsigned char* first, const unsigned char* second) {
  const uint4 v = at<uint4>(first), w = at<uint4>(second);
  to[0] = __byte_perm(v.x, w.x, 0x5410), to[1] = __byte_perm(v.x, w.x, 0x7632), to[2] = __byte_perm(v.y, w.y, 0x5410), to[3] = __byte_perm(v.y, w.y, 0x7632);
  to[4] = __byte_perm(v.z, w.z, 0x5410), to[5] = __byte_perm(v.z, w.z, 0x7632), to[6] = __byte_perm(v.w, w.w, 0x5410), to[7] = __byte_perm(v.w, w.w, 0x7632);
}

// d += a b for fragments of 16 x 8 and 8 x 8 numbers.
template <class T> __device__ void multiply_add(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b) {
#if __CUDA_ARCH__ >= 800
  if constexpr (std::is_same_v<T, f16>)
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(b));
  else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(b));
#endif
}

// 8 channels, from c on, of a pixel of out from the definition.
template <class T>
__device__ void redo(const Toeplitz& a, const T* in, const T* weight, const T* bias, T* out, int n, int row, int column, int c) {
  out += ((int64_t(n) * a.out_rows + row) * a.out_width + column) * a.C;
  column += a.column_shift;
#pragma unroll 1
  for (const int end = c + 8; c < end; ++c) {
    float sum = bias ? widen(bias[c]) : 0;
#pragma unroll 1
    for (int k = 0; k < a.K; ++k) {
      const int in_row = row + a.row_shift + k * int(a.dilation.divisor);
      if (column >= 0 && column < a.in_width && in_row >= 0 && in_row < a.in_rows)
        sum += widen(weight[int64_t(c) * a.K + (a.reversed ? a.K - 1 - k : k)]) * widen(in[((int64_t(n) * a.in_rows + in_row) * a.in_width + column) * a.C + c]);
    }
    out[c] = narrow<T>(sum);
  }
}

// __syncthreads, also where threads come from different branches of the code (Apart): that takes the barrier that is not `aligned`.
template <bool Apart> __device__ void sync_block() {
  if constexpr (Apart) asm volatile("barrier.sync 1;" ::: "memory");
  else __syncthreads();
}

// As `toeplitz`, for channels_last. A warp's strip is 8 pixels of 8 channels: a product's columns are the pixels of one channel. Lanes
// load 16 bytes, the 8 channels of a pixel; two such loads make a word of a fragment for each of the 8. A block's strips lie side by
// side: 8 pixels of 4 times 8 channels, of fewer where there are fewer, then more pixels. Its warps copy rows of all in memory's order,
// into shared memory and, put together there, out of it (forward: where the step's first rows of in were). In registers: two blocks
// of out and of in.
//
// Gradient: the strips' first `outs` warps make out, a block at a time, and sum grad_output; another warp a strip for each t keeps D_t of
// its 8 channels in registers for the block's life, and of these the first copy in and the second x, for out takes longest. At the end
// the block sums its D_t along their diagonals.
//
// Rows of a block's strips lie in shared memory as in global memory, in lines of 128 bytes whose granules of 16 bytes are permuted, for the
// reasons that `toeplitz` gives: a quarter of a warp loads rows 2 q of two pixels, or pixels 2 q of two rows.
template <class T, bool Gradient>
__global__ void __launch_bounds__(Gradient ? 512 : 128, Gradient ? 1 : 3)
toeplitz_last(const __grid_constant__ Toeplitz a, const T* __restrict__ in, const T* __restrict__ x, const T* __restrict__ weight,
              const T* __restrict__ bias, T* __restrict__ out, float* __restrict__ partial) {
  constexpr int pitch = last_pitch, pair_bytes = step * pitch, together = Gradient ? 1 : 2;  // blocks of out at a time
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ int kept[2];  // split and set_channel until the end, for registers have no room
  const int lane = threadIdx.x % 32, q = lane % 4, g = lane / 4, d = a.dilation.divisor, tiles = a.tiles, lead = tiles / 2;
  const auto warp = [] { return __shfl_sync(~0u, threadIdx.x / 32, 0); };
  const int strips = a.groups * a.side, role = Gradient ? warp() / strips : 0, own_strip = warp() - role * strips, thread = own_strip * 32 + lane;
  const int split = blockIdx.x / a.sets, set_channel = blockIdx.x % a.sets * a.groups * 8;
  const int outs = Gradient ? a.outs : 1;
  if (Gradient && threadIdx.x == 0) kept[0] = split, kept[1] = set_channel;
  const int own_channel = set_channel + own_strip % a.groups * 8, ring_end = a.ring_pairs * pair_bytes;

  const int stride = a.pixel_granules, next = stride * 16;  // from an even row or pixel to the next, by exclusive or
  const auto place = [&](int row, int granule) {
    return row * pitch + (granule ^ row % 2 * stride ^ row / 2 % 2 * (stride == 1 ? 2 : 1) ^ row / 4 % 2 * (stride == 4 ? 2 : 4) ^ (granule / 8 & stride - 1)) * 16;
  };
  const int granule = own_strip / a.groups * pixels * stride + own_strip % a.groups;  // the strip's first
  const int at_rows = place(2 * q, granule + g * stride), at_pixels = place(g, granule + 2 * q * stride);

  // The vector that the thread copies of rows copied_row, copied_row + 4, ...
  const int vector = thread % (8 * strips), copied_row = thread / (8 * strips), copied_side = vector / a.groups / pixels;
  const int copied_pixel = vector / a.groups % pixels, copied_channel = set_channel + vector % a.groups * 8;
  const int first_copied = place(copied_row, (copied_side * pixels + copied_pixel) * stride + vector % a.groups);
  const auto copied_at = [&](int i) { return (first_copied ^ i % 2 * (stride == 4 ? 32 : 64)) + 4 * i * pitch; };  // of row copied_row + 4 i: `place` again, less work

  int unit = split - a.splits, pair = 0, pairs = 0, slot = 0, x_slot = 0;
  const auto next_block = [&](int block) { return block += 16 * pitch, block == ring_end ? 0 : block; };
  // For registers have no room, shared memory keeps of each thread that copies in, after them x, where its rows of a unit begin, in granules
  // of the tensor, which of them there are, and its vector.
  struct Rows { int from, lo, hi, vector; };
  Rows* const in_rows = reinterpret_cast<Rows*>(shared + a.rows_offset) + thread;
  struct Vector { int granule, side, pixel, row; };
  const auto vector_of = [](const Rows* rows) { const int v = rows->vector; return Vector{v >> 8, v >> 5 & 7, v >> 2 & 7, v & 3}; };
  // Calls body(s, its unit, its first block) for each step s of all units, at once prepare(). Copying, it fetches `in`, pair after pair of
  // blocks, or rows of x for the step that a pair completes; if deep, two steps ahead.
  const auto each_step = [&]<bool Copying>(auto&& prepare, auto&& body) {
    const bool copies = Copying && role <= outs + 1, copies_x = Gradient && role == outs + 1;
    Rows* const rows = in_rows + (copies_x ? 128 : 0);
    if (copies) rows->vector = copied_channel / 8 << 8 | copied_side << 5 | copied_pixel << 2 | copied_row;
    const auto fetch = [&] {
      if (pair++ == pairs) {
        const int steps = next_steps<false>(a, unit);
        pairs = steps > 0 ? steps + lead : 0, pair = steps > 0;
        if (copies && pair) {
          const Vector v = vector_of(rows);
          const Band of = band<false>(a, unit, v.side);
          const int row = of.row + (copies_x ? 0 : a.row_shift), column = of.column + v.pixel + (copies_x ? 0 : a.column_shift);
          const int height = copies_x ? a.out_rows : a.in_rows, width = copies_x ? a.out_width : a.in_width;
          const bool there = of.busy && v.granule < a.C / 8 && column >= 0 && column < width;
          rows->from = ((of.n * height + row + v.row * d) * width + column) * (a.C / 8) + v.granule;
          rows->lo = a.dilation.steps(-row) - v.row, rows->hi = there ? a.dilation.steps(height - row) - v.row : -step;
        }
      }
      if (const int index = pair - 1 - (copies_x ? lead : 0); copies && index >= 0) {
        const int row_granules = int((copies_x ? a.out_row : a.in_row) / 8), lo = rows->lo - index * step, hi = rows->hi - index * step;
        const int to = copies_x ? a.x_offset + x_slot * pair_bytes : slot * pair_bytes;
        const uint4* from = reinterpret_cast<const uint4*>(copies_x ? x : in) + (rows->from + index * step * row_granules);
#pragma unroll
        for (int i = 0; i < step / 4; ++i, from += 4 * row_granules) copy_async(shared + to + copied_at(i), from, 4 * i >= lo && 4 * i < hi ? 16 : 0);
      }
      slot = slot + 1 == a.ring_pairs ? 0 : slot + 1;
      x_slot = x_slot + 1 == a.x_slots ? 0 : x_slot + 1;
      end_group_of_copies();
    };
#pragma unroll 1
    for (int i = 0; i <= lead; ++i) fetch();  // the first unit's first step
    const bool deep = Gradient && a.x_slots == 3;
    int next_pair = pair, next_unit = unit;
    if (deep) fetch();
    prepare();
    while (next_pair > 0) {
      const int s = next_pair - 1 - lead, own_unit = next_unit;
      if (deep) next_pair = pair, next_unit = unit, await_copies<1>();
      sync_block<Gradient>();
      fetch();  // to the slot before that of the step's first pair, which the step before read first
      if (!deep) next_pair = pair, next_unit = unit;
      if (s < 0) continue;
      if (!deep) await_copies<1>(), sync_block<Gradient>();
      body(s, own_unit, slot * pair_bytes);
    }
    if (Gradient) await_copies<0>(), sync_block<Gradient>();
  };
  if (Gradient) launch_dependents();
  const int table = a.taps_offset + own_strip * a.line_bytes, taps = table + (8 + 2 * q - g) * 8, taps_after = taps + 64 + (2 * q < g ? 0 : 7 * 128);  // for tap k, k + 8
  Packed<T, 8> initial{};
  if (!Gradient && bias && own_channel < a.C) {
#pragma unroll
    for (int i = 0; i < 8; ++i) initial.at[i] = bias[own_channel + i];
  }

  // At the end, of a strip: D_t of a channel, by t; then sums of their 31 diagonals and of grad_output, by t and channel.
  const auto squares = [&](int strip) { return reinterpret_cast<float*>(shared) + strip * tiles * 512; };
  const auto sums = [&](int strip) { return squares(strip) + tiles * 256; };
  if (role < outs) {
    T* to;
    int left;  // rows that the thread is to write
    float bias_sum = 0;  // of channel g, pixels 2 q and 2 q + 1
    each_step.template operator()<!Gradient>([&] {
      // As in `toeplitz`, for 16 k after one another for each channel. No branches, so that loads are under way together.
      if (weight && own_channel < a.C && role == 0) {
#pragma unroll 4
        for (int i = lane; i < 8 * tap_pairs(tiles); i += 32) {
          const int k = i / 128 * 16 + i % 16 - 8;
          const uint16_t* const taps = reinterpret_cast<const uint16_t*>(weight) + int64_t(own_channel + i / 16 % 8) * a.K;
          const auto tap = [&](int k) {
            const uint32_t v = taps[min(max(a.reversed ? a.K - 1 - k : k, 0), a.K - 1)];
            return uint32_t(k) < uint32_t(a.K) ? v : 0;
          };
          reinterpret_cast<uint2*>(shared + table)[i] = make_uint2(tap(k) | tap(k + 1) << 16, tap(k - 8) | tap(k - 7) << 16);
        }
      }
    }, [&](int s, int own_unit, int first_block) {
      if (s == 0) {
        const Vector v = vector_of(in_rows);
        const Band copied = band<false>(a, own_unit, v.side);
        const int column = copied.column + v.pixel;
        to = out + ((int64_t(copied.n) * a.out_rows + copied.row + v.row * d) * a.out_width + column) * a.C + v.granule * 8;
        left = (!Gradient || out) && copied.busy && v.granule < a.C / 8 && column >= 0 && column < a.out_width ? copied.rows - v.row : 0;
      }
      if (!Gradient || out || a.has_bias_sum) {
        const int staged = Gradient ? a.out_offset : first_block;  // rows of out
        int block = first_block;
        const auto load_block = [&](uint32_t (&to)[2][8]) {
          const unsigned char* const from = shared + block + at_rows, *const after = shared + block + (at_rows ^ next);
          load_two(to[0], from, after + pitch), load_two(to[1], from + 8 * pitch, after + 9 * pitch);
          block = next_block(block);
        };
        if (Gradient && a.has_bias_sum && role == 0) {  // a block counts where tap 0 meets it, or in the last step
          const int count = (s + 1) * step >= band<false>(a, own_unit, 0).rows ? tiles : 1;
          constexpr uint32_t ones = std::is_same_v<T, f16> ? 0x3c003c00 : 0x3f803f80;
#pragma unroll 1
          for (int u = 0; u <= count; ++u) {
            uint32_t b[2][8];
            load_block(b);
#pragma unroll
            for (int c = 0; c < 8; ++c) {
              float sum[4] = {};
              multiply_add<T>(sum, ones, ones, ones, ones, b[0][c], b[1][c]);
              if (c == g) bias_sum += sum[0] + sum[1];
            }
          }
        }
#pragma unroll 1
        for (int part = role; part < 2; part += Gradient ? outs : together) {
          float acc[together][8][4], first[8];
          uint32_t b[together][2][8];  // of a block each: rows 2 q and 2 q + 1, 2 q + 8 and 2 q + 9
          block = part ? next_block(first_block) : first_block;
          unpack(first, initial);
#pragma unroll
          for (int i = 0; i < together * 32; ++i) acc[i / 32][i / 4 % 8][i % 4] = first[i / 4 % 8];
          if constexpr (together == 2) load_block(b[1]);
#pragma unroll 1
          for (int u = 0; u < tiles; ++u) {  // A_u meets block u for the step's first block of out and block u + 1 for its second
#pragma unroll
            for (int i = 0; i < 16 * (together - 1); ++i) b[0][i / 8][i % 8] = b[1][i / 8][i % 8];
            load_block(b[together - 1]);
#pragma unroll
            for (int c = 0; c < 8; ++c) {
              const uint2 v = at<uint2>(shared + taps + (u * 8 + c) * 128), w = at<uint2>(shared + taps_after + (u * 8 + c) * 128);
#pragma unroll
              for (int i = 0; i < together; ++i) multiply_add<T>(acc[i][c], v.x, v.y, w.x, w.y, b[i][0][c], b[i][1][c]);
            }
          }
          __syncwarp();
#pragma unroll
          for (int i = 0; i < 4 * together; ++i) {  // rows g and g + 8, pixels 2 q and 2 q + 1
            const auto& v = acc[i / 4];
            const int k = i % 4;
            *reinterpret_cast<Packed<T, 8>*>(shared + staged + (part * 2 + i / 2) * 8 * pitch + (at_pixels ^ i % 2 * next)) =
                pack<T, 8>({v[0][k], v[1][k], v[2][k], v[3][k], v[4][k], v[5][k], v[6][k], v[7][k]});
          }
        }
        sync_block<Gradient>();
        uint32_t nan = 0;
#pragma unroll
        for (int i = 0; i < step / 4; ++i, to += 4 * a.out_row)
          if (4 * i < left && (!Gradient || outs == 1 || i % 2 == role)) {
            const uint4 v = at<uint4>(shared + staged + copied_at(i));
            *reinterpret_cast<uint4*>(to) = v;
            nan = max_nan<T>(max_nan<T>(nan, max_nan<T>(v.x, v.y)), max_nan<T>(v.z, v.w));
          }
        constexpr uint32_t infinity = std::is_same_v<T, f16> ? 0x7c00 : 0x7f80;
        if ((nan & 0x7fff) > infinity || (nan >> 16 & 0x7fff) > infinity) {
          const Vector v = vector_of(in_rows);
          const Band of = band<false>(a, own_unit, v.side);
#pragma unroll 1
          for (int i = 0; i < step && i < left; i += 4) redo(a, in, weight, bias, out, of.n, of.row + (of.rows - left + i) * d, of.column + v.pixel, v.granule * 8);
        }
        left -= step;
      } else {
        sync_block<Gradient>();
      }
    });
    if constexpr (Gradient) {
      bias_sum += __shfl_xor_sync(~0u, bias_sum, 1);
      bias_sum += __shfl_xor_sync(~0u, bias_sum, 2);
      float* const to = sums(warp() % strips);
      if (q == 0 && role == 0) to[g * 32 + 31] = bias_sum;
    }
  } else if constexpr (Gradient) {
    const int t = role - outs;
    float dots[2][8][4] = {};  // of columns 0 ... 7 and 8 ... 15, by channel
    each_step.template operator()<true>([] {}, [&](int s, int, int block) {
      block += t * 16 * pitch;
      if (block >= ring_end) block -= ring_end;
#pragma unroll 1
      for (int i = 0; i < 2 * a.has_dots; ++i, block = next_block(block)) {
        uint32_t own[2][8], other[8];
        const auto load_row = [&](uint32_t (&to)[8], int row) { load_two(to, shared + row + at_pixels, shared + row + (at_pixels ^ next)); };
#pragma unroll
        for (int h = 0; h < 2; ++h) load_row(own[h], a.x_offset + x_slot * pair_bytes + (2 * i + h) * 8 * pitch);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          load_row(other, block + h * 8 * pitch);
#pragma unroll
          for (int c = 0; c < 8; ++c) multiply_add<T>(dots[h][c], own[0][c], own[1][c], other[c]);
        }
      }
      sync_block<Gradient>();
    });

    const int own_strip = warp() % strips;
    float* const square = squares(own_strip) + t * 256;
#pragma unroll
    for (int c = 0; c < 8; ++c) {
#pragma unroll
      for (int i = 0; i < 8; ++i) square[(g + i / 2 % 2 * 8) * 16 + i / 4 * 8 + 2 * q + i % 2] = dots[i / 4][c][i % 4];
      __syncwarp();
      float sum = 0;
#pragma unroll
      for (int r = 0; r < 16; ++r) {
        if (r + lane >= 15 && r + lane < 31) sum += square[r * 17 + lane - 15];
      }
      if (lane < 31) sums(own_strip)[t * 256 + c * 32 + lane] = sum;
      __syncwarp();
    }
  }
  if constexpr (Gradient) {
    __syncthreads();
    const int split = kept[0], set_channel = kept[1];
#pragma unroll 1
    for (int i = threadIdx.x; i < a.groups * 8 * (a.K + 1); i += blockDim.x) {
      const int k = i % (a.K + 1), c = i / (a.K + 1);
      if (set_channel + c >= a.C) break;
      float sum = 0;
#pragma unroll 1
      for (int s = c / 8; s < strips; s += a.groups) {
        const float* const of = sums(s) + c % 8 * 32;
        if (k == a.K) sum += of[31];
        else if (a.has_dots) sum += of[k / 16 * 256 + 15 + k % 16] + (k % 16 ? of[(k / 16 + 1) * 256 + k % 16 - 1] : 0);
      }
      partial[(int64_t(set_channel + c) * a.blocks + split) * (a.K + 1) + (k == a.K ? k : a.K - 1 - k)] = sum;
    }
  }
}

// Copies by the bulk copy engine (compute capability 9.0), between places that are alike modulo 16 bytes. Loads count on a barrier in
// shared memory, on which all threads then wait for its phase.
inline __device__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
inline __device__ void begin_barrier(uint64_t* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1; fence.mbarrier_init.release.cluster;" ::"r"(shared_address(barrier)) : "memory");
}
inline __device__ void arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
inline __device__ void await(uint64_t* barrier, uint32_t phase) {
  asm volatile("{.reg .pred done;\nagain: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@!done bra again;}" ::"r"(shared_address(barrier)), "r"(phase) : "memory");
}
inline __device__ void bulk_load(void* to, const void* from, uint32_t bytes, uint64_t* barrier) {
  asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               ::"r"(shared_address(to)), "l"(from), "r"(bytes), "r"(shared_address(barrier)) : "memory");
}
inline __device__ void bulk_store(void* to, const void* from, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(shared_address(from)), "r"(bytes) : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
inline __device__ void await_stores_read() {  // their shared memory is free again
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
inline __device__ void show_to_copy_engine() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

constexpr int bulk_threads = 256, bulk_slots = 2, bulk_rows = 8;
// Of addresses in shared and global memory, which are congruent. (128 saves requests to L2; for float it is slower, by measurement.)
__host__ __device__ constexpr int bulk_modulus(int size) { return size == 2 ? 128 : 16; }
template <class T> __device__ int skipped(const T* at) { return int(reinterpret_cast<uintptr_t>(at) % bulk_modulus(sizeof(T)) / sizeof(T)); }  // numbers before it
constexpr int bulk_blocks(bool gradient, int V) { return gradient ? 3 - fewer_blocks : V > 1 ? 3 : 4 - fewer_blocks; }  // of a multiprocessor, by registers

// Of problems for `bulk`: plain ones are contiguous, without stride or dilation. Dilated: forward alone, also channels_last, where an image is
// a plane and a number a column with taps of its own.
enum class Form { plain, strided, dilated };

// A stretch of memory that a block works on: a band of rows of a plane, or whole planes of neighbouring channels.
struct Chunk {
  int64_t out_at;
  int in_row, in_rows, out_rows;         // of a plane: rows of in, the first by its distance from the row that tap 0 takes to the first of out
  int bias_row, bias_rows;               // of in, that the chunk adds to the gradient of the bias
  int in_skipped, out_skipped, out_numbers;  // numbers before them in shared memory
  int in_width, out_width;               // here, for the compiler fetches a kernel's parameters anew for each row
};

struct Bulk : Pass {
  int64_t in_numbers, out_numbers;       // of all planes
  int planes, log2_tx;                   // of a chunk, more than one if it holds them whole; threads for each
  int band_rows, chunks, splits;         // rows of out in a chunk; chunks of a slice, dealt to `splits` blocks
  Divisor slices, bands, columns;        // slices: of `planes` channels; bands of a plane; columns, V as one, of those that tap 0 meets
  int first_column, column_end;          // of these in out
  int items;                             // groups of R rows of such columns, of a plane in a chunk
  Divisor step;                          // stride_h, or dilation
  Divisor channels;                      // in a plane: C if channels_last, else 1
  int stride_w;
  int sums_at, slots_at, out_at, slot_bytes;  // in shared memory
};

// Starts to copy n numbers to `skipped` numbers after `to`; the last few of a tensor, short of 16 bytes, directly.
template <class T> __device__ void load_numbers(T* to, const T* from, int skipped, int n, const T* end, uint64_t* barrier) {
  constexpr int granule = 16 / sizeof(T);
  const int before = skipped % granule;
  to += skipped - before, from -= before, n += before;
  int whole = n / granule * granule;
  if (n > whole && from + whole + granule <= end) whole += granule;
#pragma unroll 1
  for (; n > whole; --n) to[n - 1] = from[n - 1];
  if (whole) bulk_load(to, from, whole * sizeof(T), barrier);
}

// A warp starts to copy n numbers, which `skipped` others precede; those short of 16 bytes at the ends directly.
template <class T> __device__ void store_numbers(T* to, const T* from, int skipped, int n, int lane) {
  constexpr int granule = 16 / sizeof(T);
  const int first = min(n, -skipped & (granule - 1)), last = n - (n - first) % granule, at = lane < first ? lane : lane + last - first;
  if (at < n) to[at] = from[at];
  __syncwarp();
  if (lane == 0 && last > first) bulk_store(to + first, from + first, (last - first) * sizeof(T));
}

// For planes whose rows do not line up with 16 bytes or are short, or with strides: rows that follow one another are one stretch of memory, which
// is copied to and from shared memory 16 bytes at a time whatever the rows' width. Forward: out is y, in is x. Transposed (input gradient): out is
// grad_input, in is grad_output, taps are reversed. Reads in (and x if Gradient) once but for rows that two bands share, writes out once, and a
// block's sums of x * grad_output for each tap and of grad_output (`partial`).
// While a block works on a chunk, the next is under way. A thread makes R rows of V columns of its plane at once, by M taps at a time.
// Columns that lie beyond x are done apart. Strided: which rows and taps meet is as in `walk`; transposed, a thread also writes the zeros of the
// columns up to the next that in reaches.
// Rows beyond the plane are multiplied as zeros, for to leave them out costs more than the products; where an infinity or NaN may make that wrong,
// sums are made anew from the definition.
// Registers: R x V sums, R + M - 1 rows of in, R of x, M weight gradients. Shared memory: the taps, weight gradients beyond M, and slots of a
// stretch of in and one of out, where x lies before.
template <class T, int V, int M, bool Gradient, Form form>
__global__ void __launch_bounds__(bulk_threads, bulk_blocks(Gradient, V))
bulk(const __grid_constant__ Bulk a, const T* __restrict__ in, const T* __restrict__ x, const T* __restrict__ weight, const T* __restrict__ bias,
     T* __restrict__ out, float* __restrict__ partial) {
#if __CUDA_ARCH__ >= 900
  constexpr bool Strided = form == Form::strided, Dilated = form == Form::dilated;
  constexpr int R = bulk_rows;
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ uint64_t barriers[bulk_slots];
  __shared__ Chunk described[bulk_slots];
  float* const taps = reinterpret_cast<float*>(shared);
  float* const sums = reinterpret_cast<float*>(shared + a.sums_at) + threadIdx.x;
  const int tx = 1 << a.log2_tx, lane = threadIdx.x & (tx - 1), plane = threadIdx.x >> a.log2_tx, K = a.K;
  const bool manages = threadIdx.x / 32 == bulk_threads / 32 - 1, leads = threadIdx.x == bulk_threads - 32;
  int slice;
  const int split = a.slices(blockIdx.x, slice), first_channel = slice * a.planes, planes = min(a.planes, a.C - first_channel);
  const float plane_initial = !Dilated && !Gradient && bias && plane < planes ? widen(bias[first_channel + plane]) : 0;

  const auto load_chunk = [&](int turn) {
    const int index = split + turn * a.splits, slot = turn % bulk_slots;
    if (index >= a.chunks) return;
    int band;
    const int64_t first_plane = int64_t(a.bands(index, band)) * a.C + first_channel;
    const int row = band * a.band_rows, end = min(row + a.band_rows, a.out_rows);
    // From what row on tap 0 reaches, and up to where the last tap does, in rows of in.
    const auto reach = [&](int row) { return !Strided ? row + a.row_shift : Gradient ? a.step.steps(row + a.row_shift) : row * int(a.step.divisor) + a.row_shift; };
    const auto limit = [&](int end) { return Strided && Gradient ? a.step.over(end - 1 + a.row_shift + K - 1) + 1 : reach(end - 1) + (Dilated ? (K - 1) * int(a.step.divisor) + 1 : K); };
    const int in_first = reach(row), in_begin = max(in_first, 0), in_end = max(min(limit(end), a.in_rows), in_begin);
    const int64_t in_at = first_plane * a.in_plane + int64_t(in_begin) * a.in_width;
    Chunk k;
    k.in_width = a.in_width, k.out_width = a.out_width;
    k.out_at = first_plane * a.out_plane + int64_t(row) * a.out_width;
    k.in_row = in_begin - (Strided && Gradient ? a.step.over(row) : in_first), k.in_rows = in_end - in_begin, k.out_rows = end - row;
    k.bias_row = row ? max(limit(row) - in_begin, 0) : 0, k.bias_rows = k.in_rows - k.bias_row;
    k.out_numbers = (planes - 1) * int(a.out_plane) + k.out_rows * a.out_width;
    k.in_skipped = skipped(in + in_at), k.out_skipped = skipped((Gradient && a.has_dots ? x : out) + k.out_at);
    described[slot] = k;
    unsigned char* const to = shared + a.slots_at + slot * a.slot_bytes;
    if (k.in_rows) load_numbers(reinterpret_cast<T*>(to), in + in_at, k.in_skipped, (planes - 1) * int(a.in_plane) + k.in_rows * a.in_width, in + a.in_numbers, barriers + slot);
    if (Gradient && a.has_dots) load_numbers(reinterpret_cast<T*>(to + a.out_at), x + k.out_at, k.out_skipped, k.out_numbers, x + a.out_numbers, barriers + slot);
    arrive(barriers + slot);
  };

  for (int i = threadIdx.x; i < (Dilated ? planes * int(a.channels.divisor) : planes) * K; i += bulk_threads) taps[i] = weight ? widen(weight[int64_t(first_channel) * K + (a.reversed ? i / K * K + K - 1 - i % K : i)]) : 0;
  constexpr int in_registers = Strided ? 0 : M;  // weight gradients
  if (Gradient)
    for (int i = in_registers; i < K; ++i) sums[(i - in_registers) * bulk_threads] = 0;
  float dots[M] = {}, bias_sum = 0, taps_sum = 0;
  const auto finite = [](float sum) { return sum - sum == 0; };
  // The channel, of the chunk's, of a column of out, and what an output of it holds before any tap.
  const auto channel_of = [&](int w) { int channel = 0; if (Dilated) a.channels(w, channel); return Dilated ? channel + plane * int(a.channels.divisor) : plane; };
  const auto initial_of = [&](int channel) { return !Dilated ? plane_initial : bias ? widen(bias[first_channel + channel]) : 0; };
  for (int turn = 1 - bulk_slots; split + turn * a.splits < a.chunks; ++turn) {
    if (leads) {
      if (turn < 0) {
        for (int i = 0; i < bulk_slots; ++i) begin_barrier(barriers + i);
      }
      await_stores_read();
      load_chunk(turn + bulk_slots - 1);
    }
    if (turn < 0) {
      __syncthreads();
#pragma unroll 1
      for (int i = 0; i < (Dilated ? 0 : K); ++i) taps_sum += taps[plane * K + i];
      continue;
    }
    const int slot = turn % bulk_slots;
    await(barriers + slot, turn / bulk_slots % 2);
    const Chunk& k = described[slot];
    const T* const in_slot = reinterpret_cast<const T*>(shared + a.slots_at + slot * a.slot_bytes) + k.in_skipped;
    T* const out_slot = reinterpret_cast<T*>(shared + a.slots_at + slot * a.slot_bytes + a.out_at) + k.out_skipped;
    const int in_rows = k.in_rows, out_rows = k.out_rows, in_row = k.in_row, W = k.in_width, W_out = k.out_width;
#pragma unroll 1
    for (int item = plane < planes ? lane : a.items; item < a.items; item += tx) {
      int w, group = a.columns(item, w), residue = 0, tap = 0, tap_count = K;
      w = w * V + a.first_column;
      if (Dilated || (Strided && Gradient)) group = a.step(group, residue);
      const int channel = channel_of(w);
      const float initial = initial_of(channel);
      const float* const own_taps = taps + channel * K;
      const int stride = Strided ? int(a.step.divisor) : 1, dilation = Dilated ? int(a.step.divisor) : 1, in_step = Dilated ? dilation : Gradient ? 1 : stride, out_step = Dilated ? dilation : Gradient ? stride : 1;
      const int row = group * R * out_step + residue, rows_here = Dilated || (Strided && Gradient) ? a.step.steps(out_rows - row) : out_rows - row;
      int first_row = (Dilated ? row : row * in_step) - in_row, in_w = (Strided && !Gradient ? w * a.stride_w : w) + a.column_shift;  // of in, for tap 0
      const bool whole = V == 1 || w + 1 < a.column_end;  // else the last column is alone
      if (Strided && Gradient) {  // only every stride-th tap reaches
        in_w = w, w = w * a.stride_w - a.column_shift;
        const int i = a.step(row + a.row_shift + K - 1, tap);
        tap_count = a.step.steps(K - tap), tap = K - 1 - tap - (tap_count - 1) * stride;
        first_row = i - (tap_count - 1) - in_row;
      }
      const int rows_left = Strided && Gradient && (w < 0 || w >= W_out) ? 0 : rows_here;
      const bool reached = !Strided || !Gradient || (in_w >= 0 && in_w < W);
      const int in_next = Strided && !Gradient ? a.stride_w : 1;  // column of in
      const T* const first_from = in_slot + (plane * int(a.in_plane) + first_row * W + in_w);
      T* const to = out_slot + (plane * int(a.out_plane) + row * W_out + w);
      const int in_pitch = W * in_step, out_pitch = W_out * out_step;
      float acc[R][V], own[R], rows[R + M - 1][V];
#pragma unroll
      for (int i = 0; i < R * V; ++i) acc[i / V][i % V] = initial;
      const auto define = [&] {
#pragma unroll 1
        for (int i = 0; i < min(R, rows_left) * V; ++i) {
          float sum = initial;
#pragma unroll 1
          for (int k = 0; k < tap_count; ++k) {
            const int at = i / V * in_step + k * dilation;
            if (reached && first_row + at >= 0 && first_row + at < in_rows) sum += own_taps[tap + (Gradient ? k * stride : k)] * widen(first_from[at * W + i % V * in_next]);
          }
          if (i % V == 0 || whole) to[i / V * out_pitch + i % V] = narrow<T>(sum);
        }
      };
      const auto make = [&]<bool inside> {  // inside: all rows lie in the plane
        const uint32_t mine = bits(0, rows_left);
        if (Gradient) {
#pragma unroll
          for (int r = 0; r < R; ++r) own[r] = a.has_dots && (inside || mine >> r & 1) ? widen(to[r * out_pitch]) : 0;
        }
        // M taps one stride apart from tap `first` on, of `count` that are left, which read rows one in_step apart from `row` on.
        const auto take = [&]<bool all>(int first, int row, int count, const T* from) {
          uint32_t valid = ~0u;
          if (!inside) {
            constexpr bool apart = Dilated || (Strided && !Gradient);
            const int begin = apart ? a.step.steps(-row) : -row, end = apart ? a.step.steps(in_rows - row) : in_rows - row;
            valid = reached ? bits(begin, min(end, R + (all ? M : count) - 1)) : 0;
          }
          const T* at = from;
#pragma unroll
          for (int t = 0; t < R + M - 1; ++t, at += in_pitch)
#pragma unroll
            for (int v = 0; v < V; ++v)
              if (all || t < R || t < R + count - 1) rows[t][v] = inside || valid >> t & 1 ? widen(at[v * in_next]) : 0;
          float dot[M] = {}, sum = 0;
#pragma unroll
          for (int m = 0; m < M; ++m) {
            if (!all && m >= count) continue;
            const float tap = own_taps[first + m * stride];
#pragma unroll
            for (int r = 0; r < R; ++r) {
#pragma unroll
              for (int v = 0; v < V; ++v) acc[r][v] += tap * rows[r + m][v];
              if (Gradient) dot[m] += own[r] * rows[r + m][0];
            }
            sum += dot[m];
          }
          if (!Gradient) return;
          if (!inside && isnan(sum)) {
#pragma unroll
            for (int m = 0; m < M; ++m) {
              dot[m] = 0;
#pragma unroll 1
              for (int r = 0; r < min(R, rows_left); ++r)
                if (valid >> (r + m) & 1) dot[m] += widen(to[r * out_pitch]) * widen(from[(r + m) * W]);
            }
          }
#pragma unroll
          for (int m = 0; m < M; ++m) {
            if (!all && m >= count) continue;
            if (!Strided && first == 0) dots[m] += dot[m];
            else sums[(first + m * stride - in_registers) * bulk_threads] += dot[m];
          }
        };
#pragma unroll 1
        for (int phase = 0; phase < (Strided && !Gradient ? min(stride, K) : 1); ++phase) {
          const int count = Strided && !Gradient ? a.step.steps(K - phase) : tap_count;
          const T* from = first_from + phase * W;
#pragma unroll 1
          for (int m = 0; m < count; m += M, from += M * in_pitch) {
            const int first = tap + phase + m * stride, row = first_row + phase + m * in_step;
            m + M <= count ? take.template operator()<true>(first, row, M, from) : take.template operator()<false>(first, row, count - m, from);
          }
        }
        if (Dilated && !inside) {
          taps_sum = 0;
#pragma unroll 1
          for (int i = 0; i < K; ++i) taps_sum += own_taps[i];
        }
        if (out && (inside || finite(taps_sum))) {
#pragma unroll
          for (int r = 0; r < R; ++r) {
            const Packed<T, V> numbers = pack<T, V>(acc[r]);
#pragma unroll
            for (int v = 0; v < V; ++v)
              if ((inside || mine >> r & 1) && (v == 0 || whole)) to[r * out_pitch + v] = numbers.at[v];
          }
        } else if (out) define();
        if (Strided && Gradient && out) {  // columns that none of in reaches
#pragma unroll 1
          for (int c = max(w + 1, 0); c < min(w + a.stride_w, W_out); ++c) {
#pragma unroll
            for (int r = 0; r < R; ++r)
              if (inside || r < rows_here) to[r * out_pitch + c - w] = narrow<T>(0);
          }
        }
      };
      if (reached && first_row >= 0 && first_row + (R - 1) * in_step + (tap_count - 1) * dilation < in_rows && rows_left >= R) make.template operator()<true>();
      else make.template operator()<false>();
    }
    if (!Gradient && plane < planes && W_out > a.column_end - a.first_column) {  // the columns beyond x
      const int between = a.column_end - a.first_column;
#pragma unroll 1
      for (int row = lane; row < out_rows; row += tx)
#pragma unroll 1
        for (int i = 0; i < W_out - between; ++i) {
          const int w = i < a.first_column ? i : between + i;
          out_slot[plane * int(a.out_plane) + row * W_out + w] = narrow<T>(initial_of(channel_of(w)));
        }
    }
    if (Gradient && a.has_bias_sum && plane < planes)
      for (int i = lane; i < k.bias_rows * W; i += tx) bias_sum += widen(in_slot[plane * int(a.in_plane) + k.bias_row * W + i]);
    if (out) show_to_copy_engine();
    __syncthreads();
    if (out && manages) store_numbers(out + k.out_at, out_slot, k.out_skipped, k.out_numbers, threadIdx.x % 32);
  }
  if (leads) await_stores_read();  // before the block gives up its shared memory or uses it otherwise
  if (Gradient && partial) {
    __syncthreads();
    float* const all = reinterpret_cast<float*>(shared + a.slots_at);
    const auto put = [&](int k, float sum) { all[k * sums_pitch(bulk_threads) + threadIdx.x] = sum; };
#pragma unroll
    for (int m = 0; m < in_registers; ++m)
      if (m < K) put(K - 1 - m, dots[m]);
    for (int k = in_registers; k < K; ++k) put(K - 1 - k, sums[(k - in_registers) * bulk_threads]);
    put(K, bias_sum);
    sum_threads<false>(a, all, K + 1, sums_pitch(bulk_threads), bulk_threads, bulk_threads >> a.log2_tx, partial, [&](int first, int& c) {
      c = first_channel + (first >> a.log2_tx);
      return c < first_channel + planes ? split : -1;
    });
  }
#endif
}

struct Planes : Pass {
  int64_t in_numbers, out_numbers;    // of all planes
  int planes, splits;                 // planes of a chunk, of neighbouring channels of an image; blocks to which the images are dealt
  Divisor slices, threads, columns;   // slices: of `planes` channels; threads of a plane; columns of out
  int gap;                            // if Gaps: numbers before and after each plane of in in shared memory that are zeros
  int slots, slot_bytes, out_at;      // in shared memory: slots of a chunk; bytes of each, numbers before out in it
};

constexpr int planes_slots = 3;
constexpr int planes_threads(int M) { return M > 21 ? 192 : 256; }  // of a block, at most: with more, registers would spill
constexpr int planes_blocks(int size, bool gradient, int R, int M) {  // of a multiprocessor, by registers
  if (M > 20) return gradient ? 2 : 3;
  return gradient ? 3 + (R == 8 && M <= 7) - fewer_blocks : 4 + (R == 8 && size == 4 && !fewer_blocks);
}

// As `bulk`, for planes that shared memory holds whole, at stride 1. With Gaps, planes of in are copied one by one, to
// places with zeros between them, which taps beyond a plane meet; else planes have up to R rows, and row i of in meets row r of out where
// |i - r| <= M / 2. Rows of a residue class modulo the dilation lie side by side with the others' in longer rows, the last of which may end early, but
// for planes of up to R rows whose distances are all among M.
// A thread makes R rows of a column, the same of each chunk, by M taps at once; the last warp copies. Where an infinity
// or NaN meets a zero, out is made anew from the definition, and the gradient of the weight by `reduce`.
// Registers: R sums, R of x, M taps and their gradients. Shared memory: slots of planes of in and of out, where x lies before.
template <class T, int R, int M, bool Gaps, bool Gradient>
__global__ void __launch_bounds__(planes_threads(M), planes_blocks(sizeof(T), Gradient, R, M))
planes(const __grid_constant__ Planes a, const T* __restrict__ in, const T* __restrict__ x, const T* __restrict__ weight, const T* __restrict__ bias,
       T* __restrict__ out, float* __restrict__ partial) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ uint64_t barriers[planes_slots];
  const int K = a.K, W = a.in_width, W_out = a.out_width, in_pitch = int(a.in_plane) + a.gap;
  int slice, thread, w;
  const int split = a.slices(blockIdx.x, slice), first_channel = slice * a.planes, planes = min(a.planes, a.C - first_channel);
  const int plane = a.threads(threadIdx.x, thread), row = a.columns(thread, w) * R, in_w = w + a.column_shift, copier = threadIdx.x - (blockDim.x - 32);
  const bool works = copier < 0 && plane < planes, reached = in_w >= 0 && in_w < W;
  const auto slot_at = [&](int slot) { return reinterpret_cast<T*>(shared + slot * a.slot_bytes); };
  const auto tap = [&](int k) { return widen(weight[(first_channel + plane) * K + (a.reversed ? K - 1 - k : k)]); };
  const auto each_tap = [&](const auto& f) { a.each_tap<M, all_distances(R, M)>(Gaps ? a.row_shift : -(M / 2), f); };
  const auto load_chunk = [&](int n, int slot) {
    if (n >= a.p.N) return;
    const int64_t first_plane = int64_t(n) * a.C + first_channel;
    const T *const from = in + first_plane * a.in_plane, *const from_x = x + first_plane * a.out_plane;
    T* const to = slot_at(slot);
    for (int i = copier; Gaps && i < planes; i += 32)
      bulk_load(to + a.gap + i * in_pitch, from + i * a.in_plane, int(a.in_plane) * sizeof(T), barriers + slot);
    if (!Gaps && copier == 0) load_numbers(to, from, skipped(from), planes * int(a.in_plane), in + a.in_numbers, barriers + slot);
    if (Gradient && a.has_dots && copier == 0) load_numbers(to + a.out_at, from_x, skipped(from_x), planes * int(a.out_plane), x + a.out_numbers, barriers + slot);
    __syncwarp();
    if (copier == 0) arrive(barriers + slot);
  };
  float taps[M], dots[M] = {}, bias_sum = 0;
  each_tap([&](int m, int k) { taps[m] = works && weight ? tap(max(k, 0)) : 0, taps[m] = k < 0 ? 0 : taps[m]; });  // as in `low`
  const float initial = !Gradient && works && bias ? widen(bias[first_channel + plane]) : 0;
  if (copier >= 0) {
    if (copier == 0)
      for (int i = 0; i < a.slots; ++i) begin_barrier(barriers + i);
    __syncwarp();
    load_chunk(split, 0);
  }
  for (int i = 0; Gaps && i < a.slots; ++i)
    for (int k = 0; k <= planes; ++k)
      for (int j = threadIdx.x * (16 / sizeof(T)); j < a.gap; j += blockDim.x * (16 / sizeof(T))) *reinterpret_cast<uint4*>(slot_at(i) + k * in_pitch + j) = {};
  __syncthreads();
  for (int i = 1; copier >= 0 && i < a.slots; ++i) load_chunk(split + i * a.splits, i);  // after all blocks' first ones

  int slot = 0, phase = 0;
#pragma unroll 1
  for (int n = split; n < a.p.N; n += a.splits) {
    const int64_t first_plane = int64_t(n) * a.C + first_channel;
    const T* const in_slot = slot_at(slot) + (Gaps ? a.gap : skipped(in + first_plane * a.in_plane));
    const int out_skipped = skipped((Gradient && a.has_dots ? x : out) + first_plane * a.out_plane);
    T* const out_slot = slot_at(slot) + a.out_at + out_skipped;
    if (copier >= 0 && n != split) {
      if (copier == 0) await_stores_read();
      __syncwarp();
      load_chunk(n + (a.slots - 1) * a.splits, slot ? slot - 1 : a.slots - 1);
    }
    if (works) {
      await(barriers + slot, phase);
      // Where no column of in is reached, the same zero again and again.
      const T* const from = in_slot + (Gaps && !reached ? -1 : plane * in_pitch + (Gaps ? row + a.row_shift : 0) * W + in_w);
      T* const to = out_slot + (plane * int(a.out_plane) + row * W_out + w);
      const int pitch = Gaps && !reached ? 0 : W, out_rows = a.out_rows - row - (a.out_rows * W_out + w >= int(a.out_plane) + W_out);  // of this column
      const int in_rows = reached && !Gaps ? a.in_rows - (a.in_rows * W + in_w >= int(a.in_plane) + W) : 0;
      float acc[R], own[R], sum = 0, chunk_sum = 0;
      const T* at = to;
#pragma unroll
      for (int r = 0; r < R; ++r, at += W_out) {
        acc[r] = initial;
        if (Gradient) own[r] = a.has_dots && r < out_rows ? widen(*at) : 0;
      }
      at = from;
#pragma unroll
      for (int t = Gaps ? 0 : M / 2; t < R + (Gaps ? M - 1 : M / 2); ++t, at += pitch) {
        const float number = Gaps || t - M / 2 < in_rows ? widen(*at) : 0;
#pragma unroll
        for (int m = 0; m < M; ++m) {
          const int r = t - m;
          if (r < 0 || r >= R) continue;
          acc[r] += taps[m] * number;
          if (Gradient) dots[m] += own[r] * number;
        }
      }
#pragma unroll
      for (int r = 0; r < R; ++r) sum += acc[r];
      if (out && sum - sum == 0) {
        T* put = to;
#pragma unroll
        for (int r = 0; r < R; ++r, put += W_out)
          if (r < out_rows) *put = narrow<T>(acc[r]);
      } else if (out) {
#pragma unroll 1
        for (int r = 0; r < min(R, out_rows); ++r) {
          sum = initial;
#pragma unroll 1
          for (int k = 0; k < K; ++k) {
            const int i = row + r + k * int(a.dilation.divisor) + a.row_shift;
            if (reached && i >= 0 && i * W + in_w < a.in_plane) sum += tap(k) * widen(in_slot[plane * in_pitch + i * W + in_w]);
          }
          to[r * W_out] = narrow<T>(sum);
        }
      }
      if (Gradient && a.has_bias_sum)
        for (int i = thread; i < a.in_plane; i += a.threads.divisor) chunk_sum += widen(in_slot[plane * in_pitch + i]);
      bias_sum += chunk_sum;
      if (out) show_to_copy_engine();
    }
    __syncthreads();
    if (out && copier >= 0) store_numbers(out + first_plane * a.out_plane, out_slot, out_skipped, planes * int(a.out_plane), copier);
    if (++slot == a.slots) slot = 0, phase ^= 1;
  }
  if (copier == 0) await_stores_read();  // before the block gives up its shared memory or uses it otherwise
  if (Gradient && partial) {
    __syncthreads();
    float* const all = reinterpret_cast<float*>(shared);
    const int pitch = sums_pitch(blockDim.x);
    const auto put = [&](int k, float sum) { all[k * pitch + threadIdx.x] = sum; };
    for (int k = 0; !Gaps && k < K; ++k) put(k, 0);  // taps that meet no row
    each_tap([&](int m, int k) {
      if (k >= 0) put(K - 1 - k, dots[m]);
    });
    put(K, bias_sum);
    const int threads = a.threads.divisor;
    sum_threads<false>(a, all, K + 1, pitch, planes * threads, planes, partial, [&](int first, int& c) { return c = first_channel + first / threads, split; });
  }
#endif
}

// How a launch takes vectors of out one by one.
struct Direct : Pass {
  Divisor vectors, rows, channels, pixel, period;  // of a row of out; of a plane; C; numbers of a pixel; those after which taps repeat in shared memory
  int step_column, step_row, step_plane;                     // from a thread's vector to its next: vectors, rows, planes
  int count;                                                 // of vectors, of all planes
};

constexpr int direct_threads = 256;
constexpr int direct_blocks = 4 - fewer_blocks;  // of a multiprocessor, by registers
__host__ __device__ constexpr int direct_vectors(int bytes, bool channels_last) { return bytes < 8 ? 4 : bytes < 16 || channels_last ? 2 : 1; }

// Forward, for planes of few rows, where other kernels would have most of their rows beyond the plane: a thread makes a few vectors, `direct_threads`
// apart, by those taps alone that meet a row of in, M at a time. Reads what L1 does not have, writes out once. Registers: the vectors' sums
// and M rows of each. Shared memory: in channels_last the taps.
template <class T, int V, bool ChannelsLast>
__global__ void __launch_bounds__(direct_threads, direct_blocks) direct(const __grid_constant__ Direct a, const T* __restrict__ in, const T* __restrict__, const T* __restrict__ weight,
                                                            const T* __restrict__ bias, T* __restrict__ out, Sum<T>*) {
  constexpr bool aligned = V * sizeof(T) == 16;  // else numbers of in are read one by one
  constexpr int n_vectors = direct_vectors(V * sizeof(T), ChannelsLast), M = aligned && ChannelsLast ? 1 : 2;
  extern __shared__ __align__(16) unsigned char shared[];
  T* const repeated_taps = reinterpret_cast<T*>(shared);
  const int K = a.K, d = a.dilation.divisor, pitch = ChannelsLast ? a.period.divisor : 1, apart = ChannelsLast ? 1 : int(a.p.stride_w), in_width = a.in_width;
  if (ChannelsLast) {
    for (int i = threadIdx.x; i < pitch * K; i += direct_threads) {
      int c;
      a.channels(i / K, c);
      repeated_taps[i % K * pitch + i / K] = weight[c * K + i % K];
    }
    __syncthreads();
  }
  const int64_t in_step = int64_t(d) * a.in_columns;
  for (int first = blockIdx.x * direct_threads * n_vectors + threadIdx.x; first < a.count; first += gridDim.x * direct_threads * n_vectors) {
    Sum<T> acc[n_vectors][V];
    const T* from[n_vectors];
    int tap[n_vectors], taps[n_vectors], most = 0, column, row;
    uint32_t valid = 0;  // of each vector V numbers
    int plane = a.rows(a.vectors(first, column), row);
#pragma unroll
    for (int n = 0; n < n_vectors; ++n) {
      int w = column * V, c = 0, channel;
      if (ChannelsLast) w = a.pixel(w, c);
      a.channels(ChannelsLast ? c : plane, channel);
      const int in_w = w * int(a.p.stride_w) - int(a.p.padding_w), first_row = row * int(a.p.stride_h) - int(a.p.padding_h), begin = a.dilation.steps(-first_row);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const int w_v = ChannelsLast ? in_w + (!aligned && c + v >= a.C) : in_w + v * apart;
        if (uint32_t(aligned ? in_w : w_v) < uint32_t(in_width)) valid |= 1u << (n * V + v);
        acc[n][v] = bias ? widen(bias[ChannelsLast ? (c + v) % a.C : channel]) : 0;
      }
      taps[n] = first + n * direct_threads < a.count ? min(K, a.dilation.steps(a.in_rows - first_row)) - begin : 0;
      most = max(most, taps[n]);
      from[n] = in + (plane * a.in_plane + int64_t(first_row + begin * d) * a.in_columns + (in_w * (ChannelsLast ? a.C : 1) + c));
      if (ChannelsLast) a.period(column * V, tap[n]), tap[n] += begin * pitch;
      else tap[n] = channel * K + begin;
      column += a.step_column, row += a.step_row, plane += a.step_plane;
      if (column >= int(a.vectors.divisor)) column -= a.vectors.divisor, ++row;
      if (row >= int(a.rows.divisor)) row -= a.rows.divisor, ++plane;
    }
#pragma unroll 1
    for (int k = 0; k < most; k += M) {
      Packed<T, V> raw[M][n_vectors];
      T weights[M][n_vectors];
#pragma unroll
      for (int i = 0; i < M * n_vectors; ++i) {
        const int m = i / n_vectors, n = i % n_vectors;
        const bool there = k + m < taps[n];
        if (aligned) raw[m][n] = there && valid >> (n * V) & 1 ? load<V>(from[n]) : Packed<T, V>{};
#pragma unroll
        for (int v = 0; !aligned && v < V; ++v) raw[m][n].at[v] = there && valid >> (n * V + v) & 1 ? from[n][v * apart] : T{};
        weights[m][n] = !ChannelsLast && there ? weight[tap[n] + m] : T{};
        from[n] += in_step;
      }
#pragma unroll
      for (int i = 0; i < M * n_vectors; ++i) {
        const int m = i / n_vectors, n = i % n_vectors;
        if (k + m >= taps[n]) continue;
        Sum<T> numbers[V], w[V];
        unpack(numbers, raw[m][n]);
        if (ChannelsLast) unpack(w, load<V>(repeated_taps + tap[n] + m * pitch));
#pragma unroll
        for (int v = 0; v < V; ++v)
          if (valid >> (n * V + v) & 1) acc[n][v] += (ChannelsLast ? w[v] : widen(weights[m][n])) * numbers[v];
      }
#pragma unroll
      for (int n = 0; n < n_vectors; ++n) tap[n] += M * pitch;
    }
#pragma unroll
    for (int n = 0; n < n_vectors; ++n)
      if (first + n * direct_threads < a.count) store<V>(out + int64_t(first + n * direct_threads) * V, pack<T, V>(acc[n]));
  }
}

// How a launch makes numbers of out one by one.
struct Single {
  Divisor inner, middle, outer;  // sizes of out, in the order of memory: W_out, H_out, C or, in channels_last, C, W_out, H_out
  Divisor dilation;
  int image, channel, row, pixel;  // numbers of in from one to the next
  uint32_t step;                   // and from a row that a sum takes
  int count, K, H, W, stride_h, stride_w, padding_h, padding_w;
  bool channels_last;
};

constexpr int single_threads = 128;

// Forward, for problems so small that they take little longer than their first loads: a thread makes one number, by those taps alone that meet
// a row of in, M at a time. Reads what L1 does not have, writes out once. Registers: M numbers of in and M taps.
template <class T>
__global__ void __launch_bounds__(single_threads) single(const __grid_constant__ Single a, const T* __restrict__ in, const T* __restrict__, const T* __restrict__ weight,
                                                         const T* __restrict__ bias, T* __restrict__ out, Sum<T>*) {
  constexpr int M = sizeof(T) == 8 ? 4 : 8;
  const int number = blockIdx.x * single_threads + threadIdx.x;
  if (number >= a.count) return;
  int inner, middle, outer;
  const int n = a.outer(a.middle(a.inner(number, inner), middle), outer);
  const int c = a.channels_last ? inner : outer, h = a.channels_last ? outer : middle, w = a.channels_last ? middle : inner;
  const int in_h = h * a.stride_h - a.padding_h, in_w = w * a.stride_w - a.padding_w, begin = a.dilation.steps(-in_h);
  const int taps = in_w >= 0 && in_w < a.W ? min(a.K, a.dilation.steps(a.H - in_h)) - begin : 0;
  const T* from = in + (int64_t(n) * a.image + int64_t(c) * a.channel + int64_t(in_h + begin * int(a.dilation.divisor)) * a.row + int64_t(in_w) * a.pixel);
  const T* tap = weight + (c * a.K + begin);
  Sum<T> acc = bias ? widen(bias[c]) : 0;
#pragma unroll 1
  for (int left = taps; left > 0; left -= M, tap += M, from += int64_t(a.step) * M) {
    T numbers[M], weights[M];
    uint32_t at = 0;
#pragma unroll
    for (int m = 0; m < M; ++m, at += a.step)
      if (m < left) numbers[m] = from[at], weights[m] = tap[m];
#pragma unroll
    for (int m = 0; m < M; ++m)
      if (m < left) acc += widen(weights[m]) * widen(numbers[m]);
  }
  out[number] = narrow<T>(acc);
}

// How a launch takes lines: planes or, in channels_last, images.
struct Lean {
  Divisor line, rows, row, channels;           // threads of a line, of rows one dilation apart, of a row; C
  int count;                                   // of threads
  int H, H_out, K, dilation, padding_h;
  int padding, row_in, row_out;                // numbers, of a row
  int plane_in, plane_out;                     // numbers of a line
  bool channels_last;
};

constexpr int lean_threads = 128;
constexpr int lean_rows = 4;

// Forward at stride 1 by few instructions, for rows that do not line up and for problems that leave pipelines no time to fill: a thread makes vectors of
// J rows one dilation apart, by all taps, of which there are at most M, at once. Reads what L1 does not have, writes out once. Registers: J + M - 1 vectors
// of in, M of taps.
template <class T, int V, int M>
__global__ void __launch_bounds__(lean_threads) lean(const __grid_constant__ Lean a, const T* __restrict__ in, const T* __restrict__, const T* __restrict__ weight,
                                                     const T* __restrict__ bias, T* __restrict__ out, Sum<T>*) {
  constexpr int J = lean_rows, least = M > 3 ? M - 3 : 1;  // taps
  const int thread = blockIdx.x * lean_threads + threadIdx.x, d = a.dilation, C = a.channels.divisor;
  if (thread >= a.count) return;
  int column, channel, rest;
  const int line = a.line(thread, rest), group = a.rows(rest, rest), row = group * J * d + a.row(rest, column), in_row = row - a.padding_h, in_column = column * V - a.padding;
  a.channels(a.channels_last ? column * V : line, channel);
  const T* const from = in + (int64_t(line) * a.plane_in + int64_t(in_row) * a.row_in + in_column);
  T* const to = out + (int64_t(line) * a.plane_out + int64_t(row) * a.row_out + column * V);
  const bool reached = in_column >= 0 && in_column < a.row_in;
  const auto make = [&]<bool guarded> {
    Packed<T, V> raw[J + M - 1];
    T taps[V][M];
    Sum<T> acc[J][V];
    const auto there = [&](int i) { return !guarded || (reached && uint32_t(in_row + i * d) < uint32_t(a.H)); };
    const auto used = [&](int m) { return m < least || m < a.K; };
#pragma unroll
    for (int i = 0; i < J + M - 1; ++i)
      if (used(i - J + 1) && there(i)) raw[i] = load<V>(from + i * (d * a.row_in));
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int c = a.channels_last && channel + v >= C ? 0 : channel + (a.channels_last ? v : 0);
#pragma unroll
      for (int m = 0; m < M; ++m)
        if (used(m)) taps[v][m] = weight[c * a.K + m];
#pragma unroll
      for (int j = 0; j < J; ++j) acc[j][v] = bias ? widen(bias[c]) : 0;
    }
#pragma unroll
    for (int j = 0; j < J; ++j) {
#pragma unroll
      for (int m = 0; m < M; ++m) {
        if (!used(m) || !there(j + m)) continue;  // left out, not multiplied by zero, for weight may be infinite
        Sum<T> numbers[V];
        unpack(numbers, raw[j + m]);
#pragma unroll
        for (int v = 0; v < V; ++v) acc[j][v] += widen(taps[v][m]) * numbers[v];
      }
      if (!guarded || row + j * d < a.H_out) store<V>(to + j * (d * a.row_out), pack<T, V>(acc[j]));
    }
  };
  if (reached && in_row >= 0 && in_row + (J + a.K - 2) * d < a.H && row + (J - 1) * d < a.H_out) make.template operator()<false>();
  else make.template operator()<true>();
}

// ---- Host ----
// A launch of one of the kernels: A is Walk, March, Low, Toeplitz, Bulk, Planes, Direct, Single or Lean.
template <class A> struct Plan {
  A a;
  bool applies;  // else the kernel cannot do it
  int64_t blocks;
  int threads;
  size_t shared;  // bytes for a block
  Sums sums;
};

using Outcome = std::optional<const char*>;  // of an attempt: nothing if it does not apply, else what went wrong or null

// Plans and what else does not depend on a kernel's instance are plain functions, compiled once.
const char* check(cudaError_t);
const char* allow(const void* kernel, size_t shared);
void* make_room(const Sums&, const Call&);
uint64_t alignment(const Call&);
inline bool dense(const Problem& p) { return p.stride_h == 1 && p.stride_w == 1; }
bool aligned_tiles(const Call&);
Plan<Walk> walk_plan(const Call&, const void* kernel, int V, int R, int M);
Plan<March> march_plan(const Call&, int V, int M);
Plan<Low> low_plan(const Call&, int V, int R, int M);
Plan<Toeplitz> toeplitz_plan(const Call&);
Plan<Bulk> bulk_plan(const Call&, int V, int M, Form);
Plan<Planes> planes_plan(const Call&, int R, int M, bool gaps);
Plan<Direct> direct_plan(const Call&, int V);
Plan<Single> single_plan(const Call&);
Plan<Lean> lean_plan(const Call&, int V);
}  // namespace gpu
// ---- end of the kernels ----

#include <numeric>

inline namespace gpu {
template <class... Numbers> bool all_below(int64_t limit, Numbers... numbers) { return (... && (numbers < limit)); }

struct Device {
  int multiprocessors, shared_bytes, shared_per_multiprocessor, capability;
  mutable const void* allowed[4096];  // kernels, by address, that may have all shared memory
};
const Device& current_device() {  // asked of the driver once: it takes microseconds to answer
  static const Device* const devices = [] {
    int count = 0;
    cudaGetDeviceCount(&count);
    auto* const all = new Device[count]();
    for (int i = 0; i < count; ++i) {
      cudaDeviceGetAttribute(&all[i].multiprocessors, cudaDevAttrMultiProcessorCount, i);
      cudaDeviceGetAttribute(&all[i].shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, i);
      all[i].shared_bytes -= 1 << 10;  // kernels declare some themselves
      cudaDeviceGetAttribute(&all[i].shared_per_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor, i);
      cudaDeviceGetAttribute(&all[i].capability, cudaDevAttrComputeCapabilityMajor, i);
    }
    return all;
  }();
  int current = 0;
  cudaGetDevice(&current);
  return devices[current];
}

// Blocks for each of `slices`, to which its `tiles` are dealt: so many that whole waves of blocks that run at once take the fewest
// tiles one after the other; to begin and end a block takes as long as two.
int deal(int64_t slices, int64_t tiles, int64_t blocks_per_multiprocessor) {
  const int64_t at_once = larger(blocks_per_multiprocessor, 1) * current_device().multiprocessors;
  int best = 1;
  for (int64_t splits = 1, least = INT64_MAX; splits <= smaller(tiles, ceil_div(8 * at_once, slices)); ++splits) {
    const int64_t cost = ceil_div(slices * splits, at_once) * (ceil_div(tiles, splits) + 2);
    if (cost < least) least = cost, best = splits;
  }
  return best;
}

int size_of(Type type) { return type == Type::f64 ? 8 : type == Type::f32 ? 4 : 2; }

// The largest power of two of bytes at whose multiples rows of all tensors begin, and columns that meet.
uint64_t alignment(const Call& c) {
  const Problem& p = c.p;
  const uint64_t pixel = (p.channels_last ? p.C : 1) * size_of(p.type);
  const auto at = [](const void* tensor) { return reinterpret_cast<uintptr_t>(tensor); };
  const uint64_t any = p.W * pixel | p.W_out * pixel | p.padding_w * pixel | (p.stride_w > 1 ? pixel : 0) | at(c.in) | at(c.x) | at(c.out);
  return any & -any;
}

Pass make_pass(const Call& c) {
  const Problem& p = c.p;
  Pass a{p, int(p.K), int(p.C), c.transposed, c.grad_weight != nullptr, c.grad_bias != nullptr, int(p.H), int(p.W), int(p.H_out), int(p.W_out)};
  a.dilation = p.dilation, a.row_shift = -p.padding_h, a.column_shift = -p.padding_w;
  if (c.transposed) {
    std::swap(a.in_rows, a.out_rows), std::swap(a.in_width, a.out_width);
    a.row_shift = p.padding_h - (p.K - 1) * p.dilation, a.column_shift = p.padding_w;
  }
  const int64_t pixel = p.channels_last ? p.C : 1, in_pixel = p.x_channels_last ? p.C : pixel;
  a.in_columns = a.in_width * in_pixel, a.out_columns = a.out_width * pixel;
  a.in_plane = int64_t(a.in_columns) * a.in_rows, a.out_plane = int64_t(a.out_columns) * a.out_rows;
  return a;
}

// Whether at stride 1 all rows of grad_output are met by some row of x: then its sum can be taken on the way.
bool sees_grad_output(const Pass& a) { return !a.has_bias_sum || (a.p.padding_h <= (a.p.K - 1) * a.p.dilation && a.p.H >= a.p.dilation); }

const char* check(cudaError_t error) { return error == cudaSuccess ? nullptr : (cudaGetLastError(), cudaGetErrorString(error)); }

// Memory for the blocks' sums, if they are wanted.
void* make_room(const Sums& sums, const Call& c) {
  return c.grad_weight || c.grad_bias ? c.scratch(c.p.C * (sums.dots + 1) * sums.blocks * larger(size_of(c.p.type), sizeof(float)), c.context) : nullptr;
}

// Leave for more than the 48 KB of shared memory that need none, with what kernels declare: for all there is, as other threads' launches
// stand on it, and before the driver is asked how many blocks are resident, for without it that is none.
const char* allow(const void* kernel, size_t shared) {
  const Device& device = current_device();
  const void** const allowed = &device.allowed[reinterpret_cast<uintptr_t>(kernel) / 16 % 4096];
  if (shared <= 47 << 10 || __atomic_load_n(allowed, __ATOMIC_RELAXED) == kernel) return nullptr;
  const char* const error = check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared_bytes));
  if (!error) __atomic_store_n(allowed, kernel, __ATOMIC_RELAXED);
  return error;
}

// Of `walk`, and with M = 0 of `slide`, where each thread has a line.
Plan<Walk> walk_plan(const Call& c, const void* kernel, int V, int R, int M) {
  const Problem& p = c.p;
  const bool last = p.channels_last, gradient = c.transposed;
  const int size = size_of(p.type);
  const int64_t s = p.stride_h, d = p.dilation, g = std::gcd(s, d);
  Plan<Walk> plan{{make_pass(c)}};
  Walk& a = plan.a;
  int64_t row_end = a.out_rows;
  if (a.has_bias_sum) a.row_begin = -p.padding_h, row_end = larger(p.H, (p.H_out - 1) * s - p.padding_h + 1);  // all rows that grad_output meets by tap 0
  a.pixel_begin = gradient && !a.has_bias_sum ? p.padding_w / p.stride_w : 0;
  a.pixels = (gradient ? larger(a.has_bias_sum ? p.W_out : 0, ceil_div(p.W + p.padding_w, p.stride_w)) : p.W_out) - a.pixel_begin;
  a.pixel = last ? p.C : 1, a.channels = p.C;
  const int64_t in_step = gradient ? d / g : s * d / g, out_step = gradient ? s * d / g : d / g;
  a.in_step = in_step, a.out_step = out_step, a.taps_step = s / g;
  const int64_t rows = row_end - a.row_begin, vectors = a.pixels * int64_t(a.pixel.divisor) / V, planes = last ? p.N : p.N * p.C;
  const int64_t groups_per_residue = ceil_div(ceil_div(rows, out_step), R), groups = smaller(out_step, rows) * groups_per_residue;
  a.plane_step = gradient && !last ? p.C : 1;
  const int64_t lines = planes / a.plane_step * groups, widest = larger(p.W, p.W_out) * (p.x_channels_last ? p.C : int64_t(a.pixel.divisor));
  plan.applies = all_below(1 << 30, lines, p.H + 2 * p.padding_h, planes, widest) && widest * larger(in_step, out_step) * (R + 10) < 1ll << 32;
  if (!plan.applies) return plan;
  a.groups_per_residue = groups_per_residue, a.groups = groups, a.lines = lines;

  const int64_t most = current_device().shared_bytes;
  while (a.log2_tx < (p.x_channels_last ? 3 : (V == 1 ? size > 2 : M == 0) ? 6 : 5) && (1 << a.log2_tx) < vectors) ++a.log2_tx;
  const bool staged = last && c.weight && M;
  while (staged && a.log2_tx && (p.K * size * V << a.log2_tx) > most / 4) --a.log2_tx;
  const size_t weights = staged ? round_up(p.K * size * V << a.log2_tx, 16) : 0;
  const size_t sums = gradient ? larger(size, sizeof(float)) * (last ? V : 1) : 0;  // bytes for each thread and tap
  plan.threads = last && M ? 256 : 128, a.dot_end = a.has_dots ? p.K : 0;
  while (gradient && plan.threads > larger(32, 1 << a.log2_tx) && weights + sums * sums_pitch(plan.threads) * (a.dot_end + 1) > most / 2) plan.threads /= 2;
  if (gradient) a.dot_end = smaller(a.dot_end, (most - weights) / (sums * sums_pitch(plan.threads)) - 1);
  plan.shared = weights + sums * sums_pitch(plan.threads) * (a.dot_end + 1);

  const int64_t column_tiles = ceil_div(vectors, 1 << a.log2_tx), slices = column_tiles * a.plane_step, tiles = ceil_div(lines, plan.threads >> a.log2_tx);
  a.column_tiles = column_tiles, a.slices = slices;
  // The device starts blocks in the order of memory: of short ones, neighbours read the rows they share at the same time, and L2 has them.
  // But each reads its weights, if channels_last, and adds up its sums, if gradient.
  if (M == 0) a.splits = tiles;
  else if (!gradient && !last) a.splits = ceil_div(tiles, ceil_div(tiles * slices, 256 * current_device().multiprocessors));
  else {
    int resident = 1;
    allow(kernel, plan.shared);
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, plan.threads, plan.shared);
    a.splits = deal(slices, tiles, resident);
  }
  plan.blocks = slices * a.splits;
  a.blocks = (last && p.C > V << a.log2_tx ? a.pixels : column_tiles) * a.splits;
  plan.sums = {.dots = a.dot_end, .blocks = a.blocks};
  return plan;
}

Plan<March> march_plan(const Call& c, int V, int M) {
  const Problem& p = c.p;
  const bool last = p.channels_last, gradient = c.transposed;
  const int size = size_of(p.type);
  Plan<March> plan{{make_pass(c)}};
  March& a = plan.a;
  const int64_t walked = a.has_bias_sum ? p.W_out : a.out_width;
  const int64_t pixel = last ? p.C : 1, tile = march_threads * V;
  int64_t images = 1, group_tiles = 1;  // as few images side by side as fill tiles; contiguous, planes that fill a tile
  double filled = 0;
  for (int64_t i = 1; i <= (last ? smaller(p.N, 32) : larger(smaller(p.C, tile / walked), 1)) && filled < .8; ++i) {
    const int64_t needed = ceil_div(i * walked * pixel, tile);
    const double fills = double(i * walked * pixel) / (needed * tile) * (last ? 1 : double(p.C) / round_up(p.C, i));
    if ((!last || p.N % i == 0) && fills > filled) images = i, group_tiles = needed, filled = fills;
  }
  const int64_t longest = ceil_div(a.out_rows, p.dilation), residues = smaller(p.dilation, a.out_rows), planes = (last ? p.N / images : p.N) * residues;
  const int64_t tiles = last ? group_tiles : group_tiles * ceil_div(p.C, images);
  // 32-bit indices
  plan.applies = current_device().capability >= 8 && dense(p) && p.K <= M && alignment(c) >= V * size && all_below(1 << 30, p.N * a.out_rows * tiles, p.N * p.C, (tiles + 1) * tile, p.C * p.K, p.H + 2 * p.padding_h + (p.K + 32) * p.dilation) &&
                 sees_grad_output(a) && filled >= .5;
  if (!plan.applies) return plan;
  a.column_begin = a.has_bias_sum ? -p.padding_w * pixel : 0, a.columns = images * walked * pixel, a.images = images, a.row = walked * pixel, a.in_shift = a.column_shift * pixel;
  a.channels = p.C, a.tiles = tiles, a.group_tiles = group_tiles, a.residues = residues, a.planes = planes;
  plan.threads = march_threads;
  plan.shared = larger(march_threads * V * size * (gradient ? 2 : 1) * march_slots(M), gradient ? sums_pitch(march_threads, last ? V : 1) * sizeof(float) * (p.K + 1) : 0);

  // As few bands as keep 8 warps of a multiprocessor busy: rows where they meet are read twice. Costs are in rows.
  const Device& device = current_device();
  const int64_t resident = smaller(march_blocks(M, V, last, gradient), device.shared_per_multiprocessor / (plan.shared + 1024)), least = smaller(resident, M == 21 || !(gradient || last) ? resident : 2);
  const double ending = gradient ? 4 + 5. * (p.K + 1) / size * fmin(1., double(last ? p.C : images) / tile) : 0;  // writes the sums
  double best = 1e30;
  for (int64_t bands = 1; bands <= smaller(longest, 64); ++bands) {
    const int64_t band_rows = ceil_div(longest, bands);
    if (ceil_div(longest, band_rows) < bands) continue;
    for (int64_t waves = 1, repeats = 2; waves <= 8 && repeats > 1; ++waves) {
      repeats = !gradient ? 1 : ceil_div(planes, larger(smaller(resident * device.multiprocessors * waves / (tiles * bands), planes), 1));
      const int64_t splits = ceil_div(planes, repeats), each = ceil_div(tiles * bands * splits, device.multiprocessors), rest = each % resident;
      const double cost = (each - rest + (rest ? larger(rest, least) : 0)) * (repeats * (band_rows + .3 * (p.K - 1) + 3) + ending);
      if (cost < best) best = cost, a.bands = bands, a.band_rows = band_rows, a.splits = splits, plan.blocks = tiles * bands * splits, a.blocks = bands * splits;
    }
  }
  a.blocks *= last && p.C > tile ? images * walked : group_tiles;
  plan.sums = {.dots = a.K, .blocks = a.blocks, .repair = a.has_dots};
  return plan;
}

Plan<Low> low_plan(const Call& c, int V, int R, int M) {
  constexpr int warps = low_threads / 32;
  const bool gradient = c.transposed;
  const Problem& p = c.p;
  Plan<Low> plan{{make_pass(c)}};
  Low& a = plan.a;
  const int64_t slices = ceil_div(p.C, 32 * V), columns = p.N * p.W;
  plan.applies = p.channels_last && dense(p) && p.H > 6 && p.H <= R && p.H == p.H_out && (all_distances(R, M) ? p.K <= 64 : p.K <= M && p.dilation == 1) && p.padding_w == 0 && p.C % V == 0 && p.C > 16 * V &&
                 alignment(c) >= V * size_of(p.type) && all_below(1 << 29, columns, p.W * p.C, p.C * p.K, p.K * p.dilation);
  if (!plan.applies) return plan;
  a.width = p.W, a.slices = slices, a.columns = columns;
  a.splits = a.blocks = deal(slices, ceil_div(columns, warps), low_blocks(R, M, gradient));
  plan.blocks = slices * a.splits, plan.threads = low_threads, plan.shared = gradient ? sizeof(float) * sums_pitch(low_threads, V) * (p.K + 1) : 0;
  plan.sums = {.dots = a.K, .blocks = a.blocks, .repair = true};
  return plan;
}

// Whether the tiles of tensor cores are aligned.
bool aligned_tiles(const Call& c) { return alignment(c) >= 16 && (c.p.channels_last ? c.p.C % 8 : c.p.padding_w) == 0; }

Plan<Toeplitz> toeplitz_plan(const Call& c) {
  const Problem& p = c.p;
  Plan<Toeplitz> plan{{make_pass(c)}};
  Toeplitz& a = plan.a;
  const Device& device = current_device();
  const bool last = p.channels_last, gradient = a.has_dots || a.has_bias_sum, aligned = aligned_tiles(c);
  const int size = size_of(p.type), strip = last ? pixels : strip_bytes / size;
  // 32-bit indices of strips, columns and rows, and in channels_last of granules of 16 bytes
  const int64_t highest = p.H + 2 * p.padding_h + (p.K + 2 * step) * p.dilation;
  plan.applies = device.capability >= 8 && dense(p) && p.K > 1 && (aligned || (!last && size == 2)) &&
                 all_below(1 << 28, p.C * p.N * ceil_div(p.W_out, strip), p.W_out, highest) && sees_grad_output(a) &&
                 (!last || all_below(1 << 30, 16 * p.C, (p.N * larger(p.H, p.H_out) + highest) * larger(p.W, p.W_out) * p.C / 8));
  if (!plan.applies) return plan;
  a.in_row = a.in_columns * p.dilation, a.out_row = a.out_columns * p.dilation;
  a.in_end = static_cast<const char*>(c.in) + p.N * p.C * a.in_plane * size, a.x_end = static_cast<const char*>(c.x) + p.N * p.C * a.out_plane * size;

  a.column_begin = a.has_bias_sum ? -p.padding_w : 0;
  const int64_t columns = a.has_bias_sum ? p.W_out : a.out_width;  // all columns of grad_output
  const int64_t strips = ceil_div(columns, strip), residues = smaller(p.dilation, a.out_rows);
  a.tiles = (p.K + 14) / 16 + 1, a.ring_pairs = a.tiles / 2 + 2, a.residues = residues;

  // Shared memory of a block and of each line, warps of a strip, and those that registers have room for on a multiprocessor.
  int64_t line_strips = 1, plane_lines = strips;
  int common = 0, roles = 1, room;  // shared memory beside the lines'; warps of a strip; warps that registers have room for
  if (last) {
    constexpr int pair = step * last_pitch;
    a.x_slots = gradient && (a.ring_pairs + 5) * pair + 32 * 1024 < device.shared_bytes ? 3 : 2;
    a.ring_pairs += a.x_slots - 2, a.x_offset = a.ring_pairs * pair, a.out_offset = a.x_offset + (a.has_dots ? a.x_slots * pair : 0);
    a.rows_offset = a.out_offset + (gradient ? pair : 0), a.taps_offset = common = a.rows_offset + (gradient ? 256 : 128) * 16;
    a.line_bytes = tap_pairs(a.tiles) * 64;
    // Two beyond 3 tiles, by measurement, where registers then have room for as many strips.
    a.outs = a.has_dots && a.tiles > 3 && a.tiles % 8 < 7 ? 2 : 1, roles = a.outs + (a.has_dots ? a.tiles : gradient), room = gradient ? 16 : 12;
  } else {
    common = (size == 4 ? 3 : 1) * 8 * tap_pairs(a.tiles), room = resident_blocks(gradient, aligned) * 4;
    if (!aligned) plane_lines = p.dilation == 1 && strips <= 8 ? 1 : ceil_div(strips, 4);
    for (;; ++plane_lines) {  // unaligned: lines as long as shared memory has room for
      line_strips = ceil_div(strips, plane_lines), a.line_columns = strip * line_strips;
      a.whole = !aligned && plane_lines == 1 && p.dilation == 1 && 2 * p.padding_w <= gap;
      a.modulus = !a.whole ? 16 : (a.in_width | a.out_width) % 2 ? 64 : 128;
      const auto pitch = [&](int64_t width) { return aligned ? strip_bytes : a.whole ? width * size : a.line_columns * size + 16 + width * p.dilation * size % 16; };
      const auto pair = [&](int64_t pitch) { return aligned ? step * pitch : a.whole ? round_up(step * pitch, 128) + 128 + gap : round_up(step * pitch + 16, 16) + gap; };
      a.in_pitch = pitch(a.in_width), a.out_pitch = pitch(a.out_width), a.pair_bytes = pair(larger(a.in_pitch, a.out_pitch));
      a.x_offset = a.ring_pairs * a.pair_bytes + (aligned ? 0 : gap), a.dots_offset = a.x_offset + (a.has_dots ? pair(a.out_pitch) : 0);
      a.line_bytes = a.dots_offset + (a.has_dots ? a.tiles * 1024 * line_strips : 0);
      if (line_strips == 1 || common + a.line_bytes <= device.shared_bytes) break;
    }
  }
  plane_lines = ceil_div(strips, line_strips);
  const int64_t lines = p.N * plane_lines;
  a.plane_lines = plane_lines, a.line_strips = line_strips, a.line_columns = strip * line_strips, a.row_granules = a.line_columns * size / 16, a.lines = lines;
  if (aligned && !last && a.has_dots && c.out && room * a.line_bytes > device.shared_per_multiprocessor) roles = 2;  // registers have room for more lines than shared memory
  const auto shared = [&](int n) { return common + n * a.line_bytes; };
  const auto resident = [&](int n) { return smaller(room / (n * line_strips * roles), device.shared_per_multiprocessor / (shared(n) + 1024)); };
  // As many busy strips as registers and shared memory have room for; preferably 4 side by side, which read 512 bytes of a row (64 of a pixel
  // if channels_last).
  const int64_t channels = last ? p.C / 8 : p.C;  // of which a strip has one
  double most = 0;
  for (const int64_t warps : {larger(last ? 4 : 4 / roles, line_strips), int64_t(2), int64_t(1)}) {
    const int64_t sets = last ? ceil_div(channels, warps) : channels, groups = ceil_div(channels, sets), side = warps / (groups * line_strips), at_once = groups * side;
    const double filled = side ? double(lines) / round_up(lines, side) * (double(channels) / (sets * groups)) : 0;
    const double busy = !side || shared(at_once) > device.shared_bytes ? 0 : resident(at_once) * at_once * filled;
    if (busy > (last ? 2 : 1.1) * most) most = busy, a.sets = sets, a.groups = groups, a.side = side;
  }
  if (!(plan.applies = most > 0)) return plan;
  a.pixel_granules = a.groups == 3 ? 4 : a.groups;

  // As few bands as keep the device busy: their first steps read rows of the band before. Costs are in quarters of a step.
  // More waves than needed: smaller blocks, which the device starts in the order of memory, share what they read of it.
  const int at_once = a.groups * a.side;
  const int64_t blocks = device.multiprocessors * resident(at_once), steps = ceil_div(ceil_div(a.out_rows, p.dilation), step), sides = ceil_div(lines, a.side);
  const int64_t least = gradient || !aligned || (last && a.sets * sides * steps < 8 * blocks) ? 1 : size == 4 ? 4 : 2;
  int64_t best = INT64_MAX;
  for (int64_t bands = 1; bands <= smaller(steps, 64); ++bands) {
    const int64_t band_steps = ceil_div(steps, bands), units = sides * residues * ceil_div(steps, band_steps);
    for (int64_t waves = least; waves <= 4 * least; ++waves) {
      const int64_t splits = larger(smaller(blocks * waves / a.sets, units), 1), each = ceil_div(units, splits);
      const int64_t cost = ceil_div(a.sets * splits, blocks) * (each * (4 * band_steps + (bands > 1 ? 2 : 1) * (a.tiles / 2)) + 4);
      if (cost < best) best = cost, a.bands = ceil_div(steps, band_steps), a.band_steps = band_steps, a.units = units, a.splits = ceil_div(units, each);
    }
  }
  plan.blocks = int64_t(a.sets) * a.splits, plan.threads = 32 * at_once * line_strips * roles, plan.shared = shared(at_once);
  a.blocks = a.splits, plan.sums = {.dots = a.K, .blocks = a.blocks, .repair = true};
  return plan;
}

Plan<Bulk> bulk_plan(const Call& c, int V, int M, Form form) {
  const Problem& p = c.p;
  const bool gradient = c.transposed, strided = form == Form::strided;
  const int size = size_of(p.type), modulus = bulk_modulus(size), R = bulk_rows, most_blocks = bulk_blocks(gradient, V);
  Plan<Bulk> plan{{make_pass(c)}};
  Bulk& a = plan.a;
  const Device& device = current_device();
  const int64_t channels = p.channels_last ? p.C : 1, halo = (p.K - 1) * p.dilation;
  plan.applies = device.capability >= 9 && p.K <= 64 && p.padding_h <= halo && channels * p.K <= 2048 && all_below(1 << 28, a.in_plane, a.out_plane, p.N * p.C, p.H + 2 * p.padding_h) &&
                 (!c.x || !c.out || (reinterpret_cast<uintptr_t>(c.x) - reinterpret_cast<uintptr_t>(c.out)) % 16 == 0);
  if (!plan.applies) return plan;
  a.step = form == Form::dilated ? p.dilation : p.stride_h, a.stride_w = p.stride_w, a.channels = channels;
  if (p.channels_last) a.C = 1, a.in_width = a.in_columns, a.out_width = a.out_columns, a.column_shift *= p.C;
  a.in_numbers = p.N * a.C * a.in_plane, a.out_numbers = p.N * a.C * a.out_plane;
  const auto bytes = [=](int64_t numbers) { return round_up(numbers * size, modulus) + modulus; };
  const auto in_bytes = [&](int64_t planes, int64_t rows) { return bytes((planes - 1) * a.in_plane + smaller(gradient ? ceil_div(rows + halo, p.stride_h) + (strided ? 1 : 0) : (rows - 1) * p.stride_h + halo + 1, a.in_rows) * a.in_width); };
  const auto slot_bytes = [&](int64_t planes, int64_t rows) { return in_bytes(planes, rows) + bytes((planes - 1) * a.out_plane + rows * a.out_width); };
  // As many rows or planes as leave room for the blocks that registers have room for.
  const int64_t sums = gradient ? sizeof(float) * bulk_threads * larger(p.K - (strided ? 0 : M), 0) : 0;  // of taps beyond registers
  const int64_t room = (device.shared_per_multiprocessor / most_blocks - 2048 - sums) / bulk_slots;
  const int64_t out_step = form == Form::dilated ? p.dilation : gradient ? p.stride_h : 1;
  int64_t band_rows = a.out_rows, planes = 1;
  for (int64_t bands = 2; slot_bytes(1, band_rows) > room && band_rows > R * out_step; ++bands) band_rows = round_up(ceil_div(a.out_rows, bands), R * out_step);
  a.first_column = gradient ? 0 : smaller(ceil_div(-a.column_shift, p.stride_w), a.out_width);
  a.column_end = gradient ? a.out_width : smaller(ceil_div(a.in_width - a.column_shift, p.stride_w), a.out_width);
  const int64_t columns = gradient && strided ? larger(p.W_out, ceil_div(p.W + p.padding_w, p.stride_w)) : ceil_div(a.column_end - a.first_column, V);
  a.columns = larger(columns, 1), a.items = ceil_div(band_rows, R * out_step) * out_step * columns;
  if (band_rows >= a.out_rows)
    while (2 * planes <= smaller(a.C, bulk_threads) && bulk_threads / planes > a.items && slot_bytes(2 * planes, band_rows) <= room) planes *= 2;
  band_rows = smaller(band_rows, a.out_rows);
  const int64_t bands = ceil_div(a.out_rows, band_rows), slices = ceil_div(a.C, planes);
  a.planes = planes, a.band_rows = band_rows, a.bands = bands, a.chunks = p.N * bands, a.slices = slices;
  while (planes << a.log2_tx < bulk_threads) ++a.log2_tx;
  a.sums_at = round_up(sizeof(float) * planes * channels * p.K, modulus);
  a.slots_at = a.sums_at + sums;
  a.out_at = in_bytes(planes, band_rows), a.slot_bytes = slot_bytes(planes, band_rows);
  plan.shared = a.slots_at + larger(bulk_slots * a.slot_bytes, gradient ? sizeof(float) * (p.K + 1) * sums_pitch(bulk_threads) : 0);
  const int64_t blocks = smaller(device.shared_per_multiprocessor / (plan.shared + 1024 + 256), most_blocks);
  if (!(plan.applies = blocks > 1 && a.slot_bytes > 2048)) return plan;  // chunks neither so large that a block is alone nor tiny
  // As in `walk`, short blocks where there are many chunks.
  const int brief = !gradient ? 4 : strided ? 6 : 5;  // chunks
  const bool many = a.chunks * slices > brief * brief * blocks * device.multiprocessors && a.slot_bytes > 20 << 10;
  a.splits = many ? ceil_div(a.chunks, brief) : deal(slices, a.chunks, blocks);
  plan.blocks = slices * a.splits, plan.threads = bulk_threads;
  a.blocks = a.splits, plan.sums = {.dots = a.K, .blocks = a.blocks};
  return plan;
}

Plan<Planes> planes_plan(const Call& c, int R, int M, bool gaps) {
  const Problem& p = c.p;
  const bool gradient = c.transposed;
  const int size = size_of(p.type);
  Plan<Planes> plan{{make_pass(c)}};
  Planes& a = plan.a;
  const Device& device = current_device();
  const auto address = [](const void* at) { return reinterpret_cast<uintptr_t>(at); };
  if (p.dilation > 1 && !(all_distances(R, M) && larger(p.H, p.H_out) <= R)) {
    if (p.padding_h % p.dilation || p.padding_w || p.W != p.W_out || p.dilation * p.W > planes_threads(M)) return plan;
    a.dilation = 1, a.in_rows = ceil_div(a.in_rows, p.dilation), a.out_rows = ceil_div(a.out_rows, p.dilation), a.row_shift /= p.dilation, a.in_width *= p.dilation, a.out_width *= p.dilation;
  }
  const int64_t threads = ceil_div(a.out_rows, R) * a.out_width, most = planes_threads(M) - 32;
  const bool fits = gaps ? p.K <= M && (address(c.in) | a.in_plane * size) % 16 == 0
                         : larger(a.in_rows, a.out_rows) <= R && p.K <= 64 && (all_distances(R, M) || (a.row_shift >= -(M / 2) && a.row_shift + p.K - 1 <= M / 2));
  if (device.capability < 9 || !dense(p) || p.channels_last || !fits || threads > most || (c.x && c.out && (address(c.x) - address(c.out)) % 16) || !all_below(1 << 28, p.N * p.C, p.C * p.K, p.K * p.dilation)) return plan;
  a.in_numbers = p.N * p.C * a.in_plane, a.out_numbers = p.N * p.C * a.out_plane, a.threads = threads, a.columns = a.out_width;
  const int64_t beyond = larger(larger(1, -a.row_shift), round_up(a.out_rows, R) + M - 1 + a.row_shift - a.in_rows);  // rows
  if (gaps) a.gap = round_up(((beyond + a.in_rows) * a.in_width - a.in_plane) * size, 128) / size;
  const auto bytes = [=](int64_t numbers) { return round_up(numbers * size + bulk_modulus(size), 128); };
  const auto out_at = [&](int64_t planes) { return bytes(planes * (a.in_plane + a.gap) + a.gap); };
  const auto slot_bytes = [&](int64_t planes) { return out_at(planes) + bytes(planes * a.out_plane); };
  const int64_t room = device.shared_per_multiprocessor / planes_blocks(size, gradient, R, M) - 1024 - 128;
  double least = 1e30;
  for (int64_t i = 1; i <= smaller(p.C, most / threads) && 2 * slot_bytes(i) <= room; ++i) {  // in warps
    const double cost = double(ceil_div(p.C, i)) * (ceil_div(i * threads, 32) + 1);
    if (cost < least) least = cost, a.planes = i;
  }
  if (!(plan.applies = a.planes > 0)) return plan;
  const int64_t slices = ceil_div(p.C, a.planes);
  a.slices = slices, a.out_at = out_at(a.planes) / size, a.slot_bytes = slot_bytes(a.planes), a.slots = smaller(planes_slots, room / a.slot_bytes);
  plan.threads = round_up(a.planes * threads, 32) + 32, plan.shared = larger(a.slots * a.slot_bytes, gradient ? sizeof(float) * (p.K + 1) * sums_pitch(plan.threads) : 0);
  const int64_t blocks = smaller(device.shared_per_multiprocessor / (plan.shared + 1024 + 64), planes_blocks(size, gradient, R, M) * planes_threads(M) / plan.threads);
  a.splits = a.blocks = deal(slices, p.N, blocks);
  plan.blocks = slices * a.splits, plan.sums = {.dots = a.K, .blocks = a.blocks, .repair = true};
  return plan;
}

Plan<Direct> direct_plan(const Call& c, int V) {
  const Problem& p = c.p;
  const int size = size_of(p.type);
  Plan<Direct> plan{{make_pass(c)}};
  Direct& a = plan.a;
  int64_t period = p.channels_last ? p.C : 1;
  while (p.channels_last && period % V) period += p.C;
  const int64_t vectors = a.out_columns / V, planes = p.channels_last ? p.N : p.N * p.C;
  plan.shared = p.channels_last ? size * period * p.K : 0;
  plan.applies = !c.transposed && plan.shared <= 32 << 10 && all_below(1 << 30, planes * p.H_out * vectors, planes, p.C * p.K, p.H + 2 * p.padding_h, p.W * p.C, p.W_out * p.C, p.W_out * p.stride_w);
  if (!plan.applies) return plan;
  a.vectors = vectors, a.rows = p.H_out, a.channels = p.C, a.pixel = p.channels_last ? p.C : 1, a.period = period, a.count = planes * p.H_out * vectors;
  a.step_column = direct_threads % vectors, a.step_row = direct_threads / vectors % p.H_out, a.step_plane = direct_threads / vectors / p.H_out;
  plan.threads = direct_threads;
  plan.blocks = smaller(ceil_div(a.count, direct_threads * direct_vectors(V * size, p.channels_last)), p.channels_last ? 8 * current_device().multiprocessors : INT32_MAX);
  return plan;
}

Plan<Single> single_plan(const Call& c) {
  const Problem& p = c.p;
  const bool last = p.channels_last;
  Plan<Single> plan{};
  const int64_t count = p.N * p.C * p.H_out * p.W_out, pixel = last ? p.C : 1, row = p.W * pixel;
  plan.applies = all_below(1 << 28, count, p.C * p.H * p.W, p.C * p.K, p.H + 2 * p.padding_h, (p.W + 2 * p.padding_w) * p.C, p.dilation * p.W * p.C);
  if (!plan.applies) return plan;
  plan.a = {last ? p.C : p.W_out, last ? p.W_out : p.H_out, last ? p.H_out : p.C, p.dilation, int(p.C * p.H * p.W), int(last ? 1 : p.H * p.W), int(row), int(pixel), uint32_t(p.dilation * row),
            int(count), int(p.K), int(p.H), int(p.W), int(p.stride_h), int(p.stride_w), int(p.padding_h), int(p.padding_w), last};
  plan.threads = single_threads, plan.blocks = ceil_div(count, single_threads);
  return plan;
}

Plan<Lean> lean_plan(const Call& c, int V) {
  const Problem& p = c.p;
  Plan<Lean> plan{};
  const int64_t pixel = p.channels_last ? p.C : 1, row_in = p.W * pixel, row_out = p.W_out * pixel, row = row_out / V, rows = p.dilation * row;
  const int64_t line = ceil_div(p.H_out, lean_rows * p.dilation) * rows, threads = (p.channels_last ? p.N : p.N * p.C) * line;
  plan.applies = all_below(1 << 30, threads, p.C * p.K, (p.H + 2 * p.padding_h) * row_in, p.H_out * row_out, (lean_rows + p.K) * p.dilation * larger(row_in, row_out));
  if (!plan.applies) return plan;
  plan.a = {line, rows, row, p.C, int(threads), int(p.H), int(p.H_out), int(p.K), int(p.dilation), int(p.padding_h), int(p.padding_w * pixel), int(row_in), int(row_out),
            int(p.H * row_in), int(p.H_out * row_out), p.channels_last};
  plan.threads = lean_threads, plan.blocks = ceil_div(threads, lean_threads);
  return plan;
}
}  // namespace gpu
// ---- end of the plans ----

inline namespace gpu {
// Launches the kernel; adds up the blocks' sums, if there are.
template <class T, class A>
const char* run(void (*kernel)(A, const T*, const T*, const T*, const T*, T*, Sum<T>*), const Plan<A>& plan, const Call& c, void* partial) {
  const void* const arguments[] = {&plan.a, &c.in, &c.x, &c.weight, &c.bias, &c.out, &partial};
  if (const char* error = allow(reinterpret_cast<const void*>(kernel), plan.shared)) return error;
  const cudaError_t error = cudaLaunchKernel(reinterpret_cast<const void*>(kernel), plan.blocks, plan.threads, const_cast<void**>(arguments), plan.shared, static_cast<cudaStream_t>(c.stream));
  return error || !partial ? check(error) : add_up(c, plan.sums, partial);
}

// R of `walk`, for which registers have room.
constexpr int walk_rows(int size, int V, int M, bool channels_last, bool gradient) {
  if (V == 1) return size == 8 ? 8 : 16;
  if (M == 3) return 2;
  return channels_last ? gradient ? 4 : 8 : gradient ? 5 : 7;
}

template <class T, int V, int M, bool ChannelsLast, bool Gradient, bool InLast = false> Outcome walk_by(Call c) {
  constexpr int R = walk_rows(sizeof(T), V, M, ChannelsLast, Gradient);
  const auto kernel = walk<T, V, R, M, ChannelsLast, Gradient, InLast>;
  Plan<Walk> plan = walk_plan(c, reinterpret_cast<const void*>(kernel), V, R, M);
  Walk& a = plan.a;
  if (!plan.applies) return "more than 2^30 planes or rows, or rows too wide, for 32-bit indices";
  void* const partial = make_room(plan.sums, c);
  const int dots = a.has_dots ? a.K : 0, at_once = a.dot_end;
  do {
    a.dot_end = smaller(dots, a.dot_begin + at_once), plan.sums.first_tap = a.dot_begin, plan.sums.dots = a.dot_end - a.dot_begin;
    if (const char* error = run<T>(kernel, plan, c, partial)) return error;
    a.has_bias_sum = false, c.out = nullptr, c.grad_bias = nullptr, a.dot_begin += at_once;
  } while (a.dot_begin < dots);
  return nullptr;
}

template <class T, int M, bool ChannelsLast> Outcome slide_by(const Call& c) {
  constexpr int V = 16 / sizeof(T), R = slide_rows(sizeof(T), M);
  const auto kernel = slide<T, V, R, M, ChannelsLast>;
  if (c.transposed || c.p.K != M || !dense(c.p) || alignment(c) < 16) return {};
  const Plan<Walk> plan = walk_plan(c, reinterpret_cast<const void*>(kernel), V, R, 0);
  if (!plan.applies || (ChannelsLast && !slide_singly(sizeof(T), M) && (c.p.C % V || reinterpret_cast<uintptr_t>(c.weight) % 16))) return {};
  return run<T>(kernel, plan, c, nullptr);
}

template <class T> Outcome launch_slide(const Call& c) {
  if (!c.p.channels_last) return slide_by<T, 3, false>(c);
  if constexpr (sizeof(T) == 4) {
    if (c.p.K == 7) return slide_by<T, 7, true>(c);
  }
  return (c.p.K == 3 ? slide_by<T, 3, true> : slide_by<T, 5, true>)(c);
}

template <class T, int V> Outcome launch_walk(const Call& c) {
  if (alignment(c) < V * sizeof(T)) return {};
  if constexpr (V > 1 && sizeof(T) == 2) {  // few taps: by vectors of 16 bytes
    if (c.p.K <= 3 && c.p.channels_last && c.transposed && alignment(c) >= 16) return walk_by<T, 8, 3, true, true>(c);
  }
  if constexpr (sizeof(T) == 8) {
    if (c.p.x_channels_last) return walk_by<T, 1, 7, false, false, true>(c);
  } else {
    if (c.p.channels_last) return (c.transposed ? walk_by<T, V, 7, true, true> : walk_by<T, V, 7, true, false>)(c);
  }
  if constexpr (sizeof(T) > 2 || V == 1) return (c.transposed ? walk_by<T, V, 7, false, true> : walk_by<T, V, 7, false, false>)(c);
  return {};
}

template <class T, int M, bool ChannelsLast, bool Gradient, int V = march_vector(sizeof(T), M, ChannelsLast, Gradient)> Outcome march_by(const Call& c) {
  const Plan<March> plan = march_plan(c, V, M);
  if (!plan.applies) return {};
  return run<T>(march<T, V, M, ChannelsLast, Gradient>, plan, c, make_room(plan.sums, c));
}

template <class T> Outcome launch_march(const Call& c) {
  const auto by = [&]<int M> { return (c.transposed ? march_by<T, M, false, true> : march_by<T, M, false, false>)(c); };
  if (!c.transposed && c.p.K < (sizeof(T) == 4 ? 8 : 4)) return {};  // taps left out are at most 3 of 11, 7
  if constexpr (sizeof(T) == 2) return by.template operator()<7>();
  else if (alignment(c) < 16) {  // rows that do not line up: a column for each thread
    const auto singly = [&]<int M> { return (c.transposed ? march_by<T, M, false, true, 1> : march_by<T, M, false, false, 1>)(c); };
    if (c.p.K > 15 && c.p.K < 22 && c.transposed) return march_by<T, 21, false, true, 1>(c);
    return c.p.K <= 15 ? singly.template operator()<15>() : singly.template operator()<31>();
  } else return c.p.K <= 11 ? by.template operator()<11>() : by.template operator()<21>();
}

template <class T> Outcome launch_march_last(const Call& c) {
  const auto by = [&]<int M> { return (c.transposed ? march_by<T, M, true, true> : march_by<T, M, true, false>)(c); };
  if (c.p.K <= 3) return c.transposed ? march_by<T, 3, true, true>(c) : Outcome();
  if (c.p.K <= 7) return by.template operator()<7>();
  if constexpr (sizeof(T) == 4) {
    if (c.p.K > 21) return by.template operator()<31>();
    if (c.p.K > 11) return by.template operator()<21>();
  } else if (c.p.K > 11) return c.transposed ? Outcome() : march_by<T, 21, true, false>(c);
  return by.template operator()<11>();
}

template <class T, int R, int M, bool Gradient> Outcome low_by(const Call& c) {
  constexpr int V = (Gradient || R > 7 || M > 7 ? 4 : 8) / sizeof(T);
  const Plan<Low> plan = low_plan(c, V, R, M);
  if (!plan.applies) return {};
  return run<T>(low<T, V, R, M, Gradient>, plan, c, make_room(plan.sums, c));
}

template <class T> Outcome launch_low(const Call& c) {
  const auto by = [&]<int R, int M> { return (c.transposed ? low_by<T, R, M, true> : low_by<T, R, M, false>)(c); };
  const bool dilated = c.p.dilation > 1;
  if (c.p.H == 7) return c.p.K <= 7 && !dilated ? by.template operator()<7, 7>() : by.template operator()<7, 13>();
  if (dilated && c.p.K <= 7) return {};  // faster by `march`
  if (dilated || c.p.K > 11) return by.template operator()<16, 31>();
  return c.p.K <= 7 ? by.template operator()<16, 7>() : by.template operator()<16, 11>();
}

template <class T> Outcome launch_toeplitz(const Call& c) {
  const Plan<Toeplitz> plan = toeplitz_plan(c);
  if (!plan.applies) return {};
  constexpr bool only_aligned = sizeof(T) == 4;
  const bool aligned = aligned_tiles(c);
  const bool split = plan.threads > 32 * plan.a.side * plan.a.line_strips;
  const auto kernel = c.grad_weight || c.grad_bias ? split ? toeplitz<T, true, true, true> : aligned ? toeplitz<T, true, true> : toeplitz<T, only_aligned, true>
                                                   : aligned ? toeplitz<T, true, false> : toeplitz<T, only_aligned, false>;
  return run<T>(kernel, plan, c, make_room(plan.sums, c));
}

template <class T> Outcome launch_toeplitz_last(const Call& c) {
  const Plan<Toeplitz> plan = toeplitz_plan(c);
  if (!plan.applies) return {};
  return run<T>(c.grad_weight || c.grad_bias ? toeplitz_last<T, true> : toeplitz_last<T, false>, plan, c, make_room(plan.sums, c));
}

template <class T, int V, int M, bool Gradient, Form form> Outcome bulk_by(const Call& c) {
  const Plan<Bulk> plan = bulk_plan(c, V, M, form);
  if (!plan.applies) return {};
  return run<T>(bulk<T, V, M, Gradient, form>, plan, c, make_room(plan.sums, c));
}

template <class T> Outcome launch_bulk(const Call& c) {
  const Problem& p = c.p;
  constexpr int pair = sizeof(T) == 2 ? 2 : 1;  // of columns, if there are many: fewer instructions a number
  const bool wide = p.W_out >= (dense(p) ? 96 : 48);
  const auto by = [&]<int M, Form form> { return (c.transposed ? bulk_by<T, 1, M, true, form> : wide ? bulk_by<T, pair, M, false, form> : bulk_by<T, 1, M, false, form>)(c); };
  if (p.dilation > 1 || p.channels_last) return !dense(p) || c.transposed ? Outcome() : (p.K <= 3 ? bulk_by<T, 1, 3, false, Form::dilated> : bulk_by<T, 1, 7, false, Form::dilated>)(c);
  if (!dense(p)) {
    if (alignment(c) >= 16 || p.K > 16 || p.stride_h > p.K || p.stride_w > 4) return {};
    if constexpr (sizeof(T) == 4) return c.transposed ? bulk_by<T, 1, 2, true, Form::strided>(c) : Outcome();
    else return by.template operator()<2, Form::strided>();
  }
  if (p.K <= 3) return by.template operator()<3, Form::plain>();
  return round_up(p.K, 5) < round_up(p.K, 7) ? by.template operator()<5, Form::plain>() : by.template operator()<7, Form::plain>();
}

template <class T, int R, int M, bool Gaps, bool Gradient> Outcome planes_by(const Call& c) {
  const Plan<Planes> plan = planes_plan(c, R, M, Gaps);
  if (!plan.applies) return {};
  return run<T>(planes<T, R, M, Gaps, Gradient>, plan, c, make_room(plan.sums, c));
}

template <class T> Outcome launch_planes(const Call& c) {
  const Problem& p = c.p;
  const auto by = [&]<int R, int M, bool Gaps> { return (c.transposed ? planes_by<T, R, M, Gaps, true> : planes_by<T, R, M, Gaps, false>)(c); };
  const int64_t rows = ceil_div(larger(p.H, p.H_out), p.dilation), made = ceil_div(c.transposed ? p.H : p.H_out, p.dilation);
  if (rows <= 7)
    if (const Outcome outcome = by.template operator()<7, 13, false>()) return outcome;
  if (rows <= 14)
    if (const Outcome outcome = p.K <= 7 ? by.template operator()<14, 7, false>() : p.K <= 11 ? by.template operator()<14, 11, false>() : by.template operator()<14, 27, false>()) return outcome;
  const auto by_taps = [&]<int R> {
    return p.K <= 3 ? by.template operator()<R, 3, true>() : p.K <= 7 ? by.template operator()<R, 7, true>() : p.K <= 11 ? by.template operator()<R, 11, true>() : by.template operator()<R, 21, true>();
  };
  if (20 * round_up(made, 14) > 21 * round_up(made, 8))  // 14 rows leave more to spare
    if (const Outcome outcome = by_taps.template operator()<8>()) return outcome;
  if (const Outcome outcome = by_taps.template operator()<14>()) return outcome;
  return by.template operator()<14, 27, false>();  // fewer taps, too, whose padding is one that no other can do
}

template <class T, int V> Outcome direct_by(const Call& c) {
  const Plan<Direct> plan = direct_plan(c, V);
  if (!plan.applies) return {};
  if constexpr (sizeof(T) < 8) {
    if (c.p.channels_last) return run<T>(direct<T, V, true>, plan, c, nullptr);
  }
  return run<T>(direct<T, V, false>, plan, c, nullptr);
}

template <class T> Outcome launch_single(const Call& c) {
  const Plan<Single> plan = single_plan(c);
  return plan.applies ? run<T>(single<T>, plan, c, nullptr) : Outcome();
}

template <class T, int V, int M> Outcome lean_by(const Call& c) {
  const Plan<Lean> plan = lean_plan(c, V);
  return plan.applies ? run<T>(lean<T, V, M>, plan, c, nullptr) : Outcome();
}

template <class T> Outcome launch_lean(const Call& c) {
  const auto by = [&]<int V> { return (c.p.K <= 3 ? lean_by<T, V, 3> : c.p.K <= 7 ? lean_by<T, V, 7> : lean_by<T, V, 11>)(c); };
  if constexpr (sizeof(T) == 2) {
    if (alignment(c) >= 4) return by.template operator()<2>();
  }
  return by.template operator()<1>();
}

template <class T> Outcome launch_direct(const Call& c) {
  if (alignment(c) >= 16) return direct_by<T, 16 / sizeof(T)>(c);
  if constexpr (sizeof(T) == 2) {
    if ((c.p.channels_last ? c.p.C * (c.p.stride_w == 1 ? c.p.W_out : 1) : c.p.W_out) % 2 == 0) return direct_by<T, 2>(c);
  }
  return direct_by<T, 1>(c);
}
}  // namespace gpu

// Launchers by type; walk_4: vectors of 4 numbers.
using Attempt = Outcome(const Call&);
Attempt lean_f32, lean_f16, lean_bf16, single_f64, single_f32, single_f16, single_bf16, direct_f64, direct_f32, direct_f16, direct_bf16, planes_f32, planes_f16, planes_bf16, slide_f32, slide_f16, slide_bf16, low_f32, low_f16, low_bf16, march_f32, march_f16, march_bf16, march_last_f32, march_last_f16, march_last_bf16, bulk_f32, bulk_f16, bulk_bf16, toeplitz_f32, toeplitz_f16, toeplitz_bf16, toeplitz_last_f16, toeplitz_last_bf16, walk_f64,
    walk_4_f32, walk_4_f16, walk_4_bf16, walk_1_f32, walk_1_f16, walk_1_bf16;
// ---- end of what is compiled with each of the following parts, side by side ----

namespace {
// Adds up the blocks' sums in fixed order, a warp for each weight and bias. `partial` is not __restrict__: blocks may still write it when this starts.
template <class T>
__global__ void __launch_bounds__(256, 4) reduce(const __grid_constant__ Problem p, const __grid_constant__ Sums s, const Sum<T>* partial,
                       const T* __restrict__ grad_output, const T* __restrict__ x, T* __restrict__ grad_weight, T* __restrict__ grad_bias) {
  const int lane = threadIdx.x % 32;
  const int64_t c = blockIdx.x;
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  for (int i = blockIdx.y * 8 + threadIdx.x / 32; i <= s.dots; i += gridDim.y * 8) {
    const int k = s.first_tap + i;
    double sum = 0;
    const auto add_lanes = [&] { for (int o = 16; o; o /= 2) sum += __shfl_xor_sync(~0u, sum, o); };
#pragma unroll 4
    for (int64_t n = lane; n < s.blocks; n += 32) sum += partial[(c * s.blocks + n) * (s.dots + 1) + i];
    add_lanes();
    if (s.repair && i < s.dots && isnan(sum)) {
      sum = 0;
      for (int64_t n = 0; n < p.N; ++n)
        for (int64_t h = 0; h < p.H_out; ++h) {
          const int64_t row = h - p.padding_h + k * p.dilation;
          const auto place = [&](int64_t H, int64_t W, int64_t h, int64_t w) { return p.channels_last ? ((n * H + h) * W + w) * p.C + c : ((n * p.C + c) * H + h) * W + w; };
          if (row < 0 || row >= p.H) continue;
          for (int64_t w = lane; w < p.W; w += 32)
            sum += widen(grad_output[place(p.H_out, p.W_out, h, w + p.padding_w)]) * widen(x[place(p.H, p.W, row, w)]);
        }
      add_lanes();
    }
    if (lane == 0 && i < s.dots && grad_weight) grad_weight[c * p.K + k] = narrow<T>(sum);
    if (lane == 0 && i == s.dots && grad_bias) grad_bias[c] = narrow<T>(sum);
  }
}

template <class T> const char* reduce_by(const Call& c, const Sums& s, const void* partial) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization, early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(c.p.C, smaller(s.dots / 8 + 1, 65535)), config.blockDim = 256, config.stream = static_cast<cudaStream_t>(c.stream);
  config.attrs = &early, config.numAttrs = current_device().capability >= 9;
  return check(cudaLaunchKernelEx(&config, reduce<T>, c.p, s, static_cast<const Sum<T>*>(partial), static_cast<const T*>(c.in), static_cast<const T*>(c.x),
                                  static_cast<T*>(c.grad_weight), static_cast<T*>(c.grad_bias)));
}
}  // namespace

const char* add_up(const Call& c, const Sums& s, const void* partial) {
  const Type type = c.p.type;
  return (type == Type::f64 ? reduce_by<double> : type == Type::f32 ? reduce_by<float> : type == Type::f16 ? reduce_by<f16> : reduce_by<bf16>)(c, s, partial);
}

// The choice of kernel: the first row that holds and whose kernel can. Fitted to the times of all that can, on an H200, for 800 problems of networks
// and random ones, and to those of forward for 15,000 small ones and 8,000 of few taps.
const char* launch(const Call& c) {
  const Problem& p = c.p;
  const int64_t K = p.K, rows = ceil_div(p.H, p.dilation), rows_made = ceil_div(c.transposed ? p.H : p.H_out, p.dilation);  // of a residue class modulo the dilation
  const bool f64 = p.type == Type::f64, f32 = p.type == Type::f32, two_bytes = !f64 && !f32, last = p.channels_last, back = c.transposed, aligned = alignment(c) >= 16;
  const int64_t strip = last ? pixels : strip_bytes / size_of(p.type);
  const auto tiles = [&](double part) { return dense(p) && p.W * rows_made > part * (round_up(p.W, strip) * round_up(rows_made, step)); };  // of the tensor cores' tiles, out fills more than that part
  const int64_t out_per_multiprocessor = p.N * p.C * p.H_out * p.W_out / current_device().multiprocessors;  // numbers
  const bool few_taps = !back && !f64 && dense(p) && K <= 11 && round_up(p.H_out, lean_rows * p.dilation) < 2 * p.H_out;  // and most rows of `lean` within the plane
  const bool small = !back && out_per_multiprocessor * (smaller(K, rows) + 40) <= 1 << (few_taps ? 15 : aligned ? 17 : 18);  // takes little longer than its first loads
  const bool tiny = p.C * (back ? 16 * p.H * p.W : p.H_out * p.W_out * larger(smaller(K, rows), 5)) < 1024;  // images, which `planes` takes one by one
  const auto by_type = [&](Attempt* of_f32, Attempt* of_f16, Attempt* of_bf16) { return f32 ? of_f32 : p.type == Type::f16 ? of_f16 : of_bf16; };
  Attempt *const bulk = by_type(bulk_f32, bulk_f16, bulk_bf16), *const lean = by_type(lean_f32, lean_f16, lean_bf16), *const direct = f64 ? direct_f64 : by_type(direct_f32, direct_f16, direct_bf16);
  const struct { bool holds; Attempt* attempt; } table[] = {
      {p.x_channels_last, walk_f64},
      {small, f64 ? single_f64 : by_type(single_f32, single_f16, single_bf16)},
      {few_taps && out_per_multiprocessor < 12000, lean},
      {f64 && !back && rows <= 6, direct},
      {f64, walk_f64},
      {last && (back || K > 3), by_type(low_f32, low_f16, low_bf16)},
      {rows > (back ? 0 : aligned ? 5 : 2) && !tiny && p.H * p.W < 4096 && (K <= (f32 || !tiles(.5) ? 21 : 11) || ceil_div(larger(p.H, p.H_out), p.dilation) < 15), by_type(planes_f32, planes_f16, planes_bf16)},
      {few_taps && !aligned && (last || p.dilation > 1) && (p.padding_w == 0 || p.W * (last ? p.C : 1) > 128), lean},
      {!back && (tiny || rows <= (dense(p) ? 6 : 20)), direct},
      {!back && (K == 3 || (last && (K == 5 || (f32 && K == 7)))), by_type(slide_f32, slide_f16, slide_bf16)},
      {two_bytes && last && K > (back && (p.H >= 160 || p.C % 64 == 0) ? 7 : 11) && tiles(K > 11 ? .15 : .4), by_type(nullptr, toeplitz_last_f16, toeplitz_last_bf16)},
      {last && 3 * K <= (back ? 5 : 4) * rows, by_type(march_last_f32, march_last_f16, march_last_bf16)},
      {two_bytes && last && !back && !aligned, bulk},
      {!last && (!dense(p) || (!aligned && (K <= 9 || p.W < 4 || (f32 ? !back && p.dilation == 1 && 10 * round_up(p.W_out, 64) > 13 * p.W_out : !tiles(!back || K > 21 ? .35 : K > 15 ? .45 : .75))))), bulk},
      {!last && (K <= 2 * rows || !aligned), by_type(march_f32, march_f16, march_bf16)},
      {!last && (f32 ? K > 13 && tiles(.5) : K > 2 && tiles(aligned_tiles(c) ? .15 : .3)), by_type(toeplitz_f32, toeplitz_f16, toeplitz_bf16)},
      {!last && back && (two_bytes || rows > 12), bulk},
      {two_bytes && !back && (last ? aligned : p.stride_w == 1) && (K <= 5 || rows <= 16), direct},
      {last && c.grad_weight && K > 80, [](const Call&) { return Outcome(contiguous_is_faster); }},  // than to read all again for every few taps
      {!(last && back && K > 29 && rows > 28), by_type(walk_4_f32, walk_4_f16, walk_4_bf16)},
      {true, by_type(walk_1_f32, walk_1_f16, walk_1_bf16)},
  };
  for (const auto& [holds, attempt] : table)
    if (holds)
      if (const Outcome outcome = attempt(c)) return *outcome;
  return "no kernel";  // not reached: the last row's always applies
}

Outcome walk_f64(const Call& c) { return launch_walk<double, 1>(c); }
Outcome bulk_f32(const Call& c) { return launch_bulk<float>(c); }
// ---- end of a part ----
Outcome march_last_f32(const Call& c) { return launch_march_last<float>(c); }
// ---- end of a part ----
Outcome planes_f32(const Call& c) { return launch_planes<float>(c); }
// ---- end of a part ----
Outcome planes_f16(const Call& c) { return launch_planes<f16>(c); }
// ---- end of a part ----
Outcome planes_bf16(const Call& c) { return launch_planes<bf16>(c); }
// ---- end of a part ----
Outcome bulk_f16(const Call& c) { return launch_bulk<f16>(c); }
Outcome slide_f32(const Call& c) { return launch_slide<float>(c); }
// ---- end of a part ----
Outcome bulk_bf16(const Call& c) { return launch_bulk<bf16>(c); }
Outcome slide_bf16(const Call& c) { return launch_slide<bf16>(c); }
// ---- end of a part ----
Outcome march_last_f16(const Call& c) { return launch_march_last<f16>(c); }
Outcome march_last_bf16(const Call& c) { return launch_march_last<bf16>(c); }
// ---- end of a part ----
Outcome low_bf16(const Call& c) { return launch_low<bf16>(c); }
Outcome walk_1_f16(const Call& c) { return launch_walk<f16, 1>(c); }
Outcome walk_1_bf16(const Call& c) { return launch_walk<bf16, 1>(c); }
// ---- end of a part ----
Outcome walk_1_f32(const Call& c) { return launch_walk<float, 1>(c); }
Outcome walk_4_f32(const Call& c) { return launch_walk<float, 4>(c); }
Outcome low_f32(const Call& c) { return launch_low<float>(c); }
Outcome lean_f32(const Call& c) { return launch_lean<float>(c); }
// ---- end of a part ----
Outcome low_f16(const Call& c) { return launch_low<f16>(c); }
Outcome walk_4_f16(const Call& c) { return launch_walk<f16, 4>(c); }
Outcome slide_f16(const Call& c) { return launch_slide<f16>(c); }
Outcome single_f16(const Call& c) { return launch_single<f16>(c); }
Outcome single_f32(const Call& c) { return launch_single<float>(c); }
// ---- end of a part ----
Outcome march_f32(const Call& c) { return launch_march<float>(c); }
Outcome walk_4_bf16(const Call& c) { return launch_walk<bf16, 4>(c); }
// ---- end of a part ----
Outcome toeplitz_f16(const Call& c) { return launch_toeplitz<f16>(c); }
Outcome toeplitz_last_f16(const Call& c) { return launch_toeplitz_last<f16>(c); }
// ---- end of a part ----
Outcome toeplitz_bf16(const Call& c) { return launch_toeplitz<bf16>(c); }
Outcome toeplitz_last_bf16(const Call& c) { return launch_toeplitz_last<bf16>(c); }
Outcome direct_f32(const Call& c) { return launch_direct<float>(c); }
// ---- end of a part ----
Outcome march_f16(const Call& c) { return launch_march<f16>(c); }
Outcome march_bf16(const Call& c) { return launch_march<bf16>(c); }
Outcome direct_f16(const Call& c) { return launch_direct<f16>(c); }
Outcome direct_bf16(const Call& c) { return launch_direct<bf16>(c); }
Outcome direct_f64(const Call& c) { return launch_direct<double>(c); }
Outcome lean_f16(const Call& c) { return launch_lean<f16>(c); }
Outcome lean_bf16(const Call& c) { return launch_lean<bf16>(c); }
Outcome single_bf16(const Call& c) { return launch_single<bf16>(c); }
Outcome single_f64(const Call& c) { return launch_single<double>(c); }
Outcome toeplitz_f32(const Call& c) { return launch_toeplitz<float>(c); }

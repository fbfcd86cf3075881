// One decoding step of a TokenLM in one call, and the draw of its tokens; a mixer's convolution and scan over many
// positions. Plain C ABI; fused.py fills the structs.
//
// Vectors are GCC's and Clang's vector extension, W floats wide by the instruction set this file is compiled for; only
// the int8 product and the reading of bfloat16 have code of their own for each. Every output is summed in an order that
// does not depend on the batch or on the number of threads, so that a row has the same bits alone and in a batch.
// Shapes: R rows, K codebooks, D model width, C channels, H heads, P head width, N state, S slots, V codes.
#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(__AVX512BW__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
constexpr int GROUP = W == 8 ? 2 : 4;  // rows of activations at a time: AVX2 has 16 registers, the others 32
constexpr int STREAMS = 4;             // rows of a weight at a time
// How many bytes ahead weights and Mamba-2 states are prefetched, and whether these are read row after row rather than
// four rows at a time; no result depends on it. Measured with 48 Mamba-2 mixers of d 1,024, in turn. Sapphire Rapids,
// AVX-512: 2 kB save a tenth to a third of a float32 or bfloat16 product and a few hundredths of an int8 step. Zen 3,
// AVX2: 1 kB saves a tenth of an int8 product and costs a float32 one a third. Zen 4: 2 kB cost a float32 step a sixth;
// 256 bytes past the nearer cache save 3 to 13 % of a step with AVX-512 and 7 to 8 % with AVX2; states row after row are
// updated at twice the rate, and a prefetch adds nothing to that.
#if defined(AMD)
constexpr int AHEAD = W > 4 ? 256 : 0, AHEAD_INT8 = AHEAD, AHEAD_STATE = 0, LOCALITY = 0;
constexpr bool STATE_BY_ROW = true;
#else
constexpr int AHEAD = W == 16 ? 2048 : 0, AHEAD_INT8 = W == 16 ? 2048 : W == 8 ? 1024 : 0, AHEAD_STATE = AHEAD;
constexpr int LOCALITY = 3;
constexpr bool STATE_BY_ROW = false;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef int16_t vs __attribute__((vector_size(W * 2)));
typedef double vd __attribute__((vector_size(W * 4)));  // W / 2 doubles
typedef int64_t vl __attribute__((vector_size(W * 4)));
typedef float vhalf __attribute__((vector_size(W * 2)));  // W / 2 floats

// ---- the C structs ----
enum Format { FP32, BF16, INT8 };
enum Kind { MAMBA2, MAMBA1, ATTENTION, CROSS_ATTENTION, MLP };
enum Norm { NONE, RMS, LAYER };

struct Linear {  // y = W x + bias, W [out, in] with `stride` elements from row to row
  const void* weight;
  const float *scale, *bias;  // scale of each row, int8 only; bias may be null
  int64_t out, in, stride, format;
};
struct Sublayer {
  int64_t kind, norm, inner, channels, taps, d_state, heads, headdim, groups, dt_rank, rotary;
  const float *norm_weight, *norm_bias, *layer_scale;  // layer_scale may be null
  Linear linears[4];  // Mamba-2: in, out; Mamba-1: in, out, x, dt; attention: q, k, v, out; MLP: fc1, fc2
  const float *conv_weight, *conv_bias, *dt_bias, *A, *D, *gate_norm;  // conv_weight [taps, C]
};
struct State {  // of a sublayer
  float* first;   // the convolution's inputs, [R, taps - 1, C]; or keys, [R, S, H, P], of a text [R, H, S, P]
  float* second;  // SSM state, [R, ...]; or values, as the keys
  const float* adaln;   // [R, 3, D] or null
  int64_t* lengths;     // attention: valid slots of each row, [R]
  const uint8_t* mask;  // cross-attention: valid tokens, [R, S]
  int64_t slots;
};
struct Model {
  int64_t d_model, n_codebooks, embedding_rows, n_sublayers, norm;
  const float *embedding, *norm_weight, *norm_bias;
  Linear heads;
  const Sublayer* sublayers;
};
struct Draw {  // settings of the draw; see ssmttm.generation.filters
  int64_t n_codebooks, n_logits, codebook_size, top_k, guided;
  float guidance_scale, temperature;
  double top_p, min_p;
};

// ---- vectors ----
static inline vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
static inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
static inline vf splat(float x) { return x - vf{}; }
static inline vf as_float(vi v) { return (vf)v; }
static inline vf larger(vf a, vf b) { return a > b ? a : b; }
static inline vf smaller(vf a, vf b) { return a < b ? a : b; }
template <class V>
static inline auto sum_lanes(V v) {  // halves, quarters, ...: the same order for every use
  constexpr int n = sizeof(V) / sizeof(v[0]);
  decltype(v[0] + v[0]) lanes[n];
  for (int i = 0; i < n; i++) lanes[i] = v[i];
  for (int width = n / 2; width; width /= 2)
    for (int i = 0; i < width; i++) lanes[i] += lanes[i + width];
  return lanes[0];
}
// out[i] = the sum of v[i]. Lanes are added in halves in every version.
#if defined(__AVX512BW__)
static inline void totals(const vf v[4], float out[4]) {
  const __m512 a = (__m512)v[0], b = (__m512)v[1], c = (__m512)v[2], d = (__m512)v[3];
  const __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE));
  const __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xEE));
  __m512 s = _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xDD));  // 4 lanes of each
  s = _mm512_add_ps(s, _mm512_shuffle_ps(s, s, 0x4E));
  s = _mm512_add_ps(s, _mm512_shuffle_ps(s, s, 0xB1));
  const __m512i firsts = _mm512_setr_epi32(0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12, 0, 4, 8, 12);
  _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, s)));
}
static inline float total(vf v) {
  const vf all[4] = {v, v, v, v};
  float out[4];
  totals(all, out);
  return out[0];
}
#elif defined(__AVX2__)
static inline void totals(const vf v[4], float out[4]) {
  __m128 half[4];
  for (int i = 0; i < 4; i++)
    half[i] = _mm_add_ps(_mm256_castps256_ps128((__m256)v[i]), _mm256_extractf128_ps((__m256)v[i], 1));
  _MM_TRANSPOSE4_PS(half[0], half[1], half[2], half[3]);
  _mm_storeu_ps(out, _mm_add_ps(_mm_add_ps(half[0], half[2]), _mm_add_ps(half[1], half[3])));
}
static inline float total(vf v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
#else
static inline float total(vf v) { return sum_lanes(v); }
static inline void totals(const vf v[4], float out[4]) {
  for (int i = 0; i < 4; i++) out[i] = total(v[i]);
}
#endif

// e^x to 2 units in the last place (Cephes' expf); x is clamped to the range of normal numbers.
static inline vf exp_(vf x) {
  x = smaller(larger(x, splat(-87.3f)), splat(88.3f));
  const vf shifted = x * 1.44269504f + 12582912.f;  // rounds to an integer in the low bits
  const vf n = shifted - 12582912.f;
  const vf r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  vf p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r * r + r) + 1.f;
  return as_float((vi)p + (((vi)shifted - 0x4B400000) << 23));
}
// log x of 1 <= x <= 2 (Cephes' logf).
static inline vf log_(vf x) {
  const vi high = x > 1.41421356f;  // -1 or 0
  const vf e = high ? splat(1.f) : vf{};
  const vf r = (high ? 0.5f * x : x) - 1.f;
  vf p = r * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * r + 1.1676998740e-1f;
  p = p * r - 1.2420140846e-1f;
  p = p * r + 1.4249322787e-1f;
  p = p * r - 1.6668057665e-1f;
  p = p * r + 2.0000714765e-1f;
  p = p * r - 2.4999993993e-1f;
  p = p * r + 3.3333331174e-1f;
  return (r + (r * r * (r * p - 0.5f) - e * 2.12194440e-4f)) + e * 0.693359375f;
}
// erf x (the rational function of Eigen's generic_fast_erf_float).
static inline vf erf_(vf x) {
  x = smaller(larger(x, splat(-4.f)), splat(4.f));
  const vf s = x * x;
  vf p = s * -2.72614225801306e-10f + 2.77068142495902e-08f;
  p = p * s - 2.10102402082508e-06f;
  p = p * s - 5.69250639462346e-05f;
  p = p * s - 7.34990630326855e-04f;
  p = p * s - 2.95459980854025e-03f;
  p = p * s - 1.60960333262415e-02f;
  vf q = s * -1.45660718464996e-05f - 2.13374055278905e-04f;
  q = q * s - 1.68282697438203e-03f;
  q = q * s - 7.37332916720468e-03f;
  q = q * s - 1.42647390514189e-02f;
  return x * p / q;
}
static inline vf silu(vf x) { return x / (1.f + exp_(-x)); }
static inline vf gelu(vf x) { return 0.5f * x * (1.f + erf_(x * 0.70710678f)); }
static inline vf softplus(vf x) {  // log(1 + e^x), with the rounding of 1 + e taken back for small e
  const vf e = exp_(x > 0.f ? -x : x), u = 1.f + e;
  const vf log1p = u == 1.f ? e : log_(u) * (e / (u - 1.f));
  return larger(x, vf{}) + log1p;
}
// y[i] = f(i) for i < n, in whole vectors: the last one is computed in a buffer of its own.
template <class F>
static inline void map(float* y, int64_t n, const float* a, const float* b, F f) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(y + i, f(load(a + i), load(b + i)));
  if (i == n) return;
  float left[W] = {}, right[W] = {}, out[W];
  std::memcpy(left, a + i, (n - i) * sizeof(float));
  std::memcpy(right, b + i, (n - i) * sizeof(float));
  store(out, f(load(left), load(right)));
  std::memcpy(y + i, out, (n - i) * sizeof(float));
}
static float sum_squares(const float* x, int64_t n) {
  vf acc = {};
  int64_t i = 0;
  for (; i + W <= n; i += W) acc += load(x + i) * load(x + i);
  float sum = total(acc);
  for (; i < n; i++) sum += x[i] * x[i];
  return sum;
}
static float dot(const float* x, const float* y, int64_t n) {
  vf acc = {};
  int64_t i = 0;
  for (; i + W <= n; i += W) acc += load(x + i) * load(y + i);
  float sum = total(acc);
  for (; i < n; i++) sum += x[i] * y[i];
  return sum;
}

static void add_scaled(float* y, const float* x, float a, int64_t n) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(y + i, load(y + i) + load(x + i) * a);
  for (; i < n; i++) y[i] += x[i] * a;
}

// ---- threads ----
// Workers that sleep between jobs, started with the first. A job is called once for each part, 0 to n - 1; part 0 runs
// in the caller.
struct Pool {
  const int parts;
  std::vector<std::thread> workers;
  std::mutex turn, mutex;  // turn: callers wait for each other
  std::condition_variable begin, end;
  const std::function<void(int)>* job = nullptr;
  uint64_t number = 0;
  int running = 0;
  bool closing = false;

  explicit Pool(int n) : parts(n) {}
  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex);
      closing = true;
    }
    begin.notify_all();
    for (auto& worker : workers) worker.join();
  }
  int size() const { return parts; }
  void work(int part, uint64_t seen) {
    for (;;) {
      std::unique_lock<std::mutex> lock(mutex);
      begin.wait(lock, [&] { return closing || number != seen; });
      if (closing) return;
      seen = number;
      const auto* current = job;
      lock.unlock();
      (*current)(part);
      lock.lock();
      if (--running == 0) end.notify_one();
    }
  }
  void run(const std::function<void(int)>& function) {
    if (parts == 1) return function(0);
    std::lock_guard<std::mutex> mine(turn);
    try {
      for (int part = (int)workers.size() + 1; part < parts; part++)
        workers.emplace_back([this, part, seen = number] { work(part, seen); });
    } catch (const std::system_error&) {  // no more threads: the caller does the parts of those that are missing
    }
    const int started = (int)workers.size();
    {
      std::lock_guard<std::mutex> lock(mutex);
      job = &function;
      number++;
      running = started;
    }
    begin.notify_all();
    function(0);
    for (int part = started + 1; part < parts; part++) function(part);
    std::unique_lock<std::mutex> lock(mutex);
    end.wait(lock, [&] { return running == 0; });
  }
};
constexpr int64_t WORTH_WAKING = 1 << 20;  // multiply-adds of a convolution or scan: 0.1 ms of a scan on Zen 4
// f(first, end) for all of n tasks, shared among the threads if these are worth waking.
template <class F>
static void share(Pool& pool, int64_t n, bool worth_waking, F f) {
  if (pool.size() == 1 || !worth_waking) return f(0, n);
  pool.run([&](int part) { f(n * part / pool.size(), n * (part + 1) / pool.size()); });
}

// ---- matrix and vectors ----
struct Fp32 {
  typedef float weight;
  static inline vf at(const float* p) { return load(p); }
  static inline float one(float w) { return w; }
};
struct Bf16 {
  typedef uint16_t weight;
  static inline vf at(const uint16_t* p) {
#if defined(__AVX512BW__)  // GCC widens in halves
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__)
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
    vh v;
    std::memcpy(&v, p, sizeof v);
    return (vf)(__builtin_convertvector(v, vu) << 16);
#endif
  }
  static inline float one(uint16_t w) {
    const uint32_t bits = (uint32_t)w << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
  }
};

template <int S, class F>
static inline void sum_streams(F acc, float* sums) {
  if (S == 4) {
    const vf all[4] = {acc(0), acc(1 % S), acc(2 % S), acc(3 % S)};
    totals(all, sums);
  } else {
    for (int s = 0; s < S; s++) sums[s] = total(acc(s));
  }
}
// Rows o, o + apart, ... of the weight by B rows of x. Rows far apart are as many long streams, which the hardware's
// prefetcher follows; neighbouring rows are short ones.
template <class F, int B, int S>
static inline void product(const Linear& l, const float* x, float* y, int64_t o, int64_t apart) {
  const auto* w = (const typename F::weight*)l.weight + o * l.stride;
  const int64_t step = apart * l.stride, whole = l.in / W * W;
  vf acc[S][B] = {};
  for (int64_t i = 0; i < whole; i += W)
    for (int s = 0; s < S; s++) {
      if (AHEAD) __builtin_prefetch((const char*)(w + s * step + i) + AHEAD, 0, LOCALITY);
      const vf v = F::at(w + s * step + i);
      for (int b = 0; b < B; b++) acc[s][b] += v * load(x + b * l.in + i);
    }
  for (int b = 0; b < B; b++) {
    float sums[S];
    sum_streams<S>([&](int s) { return acc[s][b]; }, sums);
    for (int s = 0; s < S; s++) {
      for (int64_t i = whole; i < l.in; i++) sums[s] += F::one(w[s * step + i]) * x[b * l.in + i];
      y[b * l.out + o + s * apart] = sums[s];
    }
  }
}
// int8 weights by 15-bit activations in exact 32-bit sums: a lane takes in / W products below 2^21, so in <= 1024 W.
struct Quantised {
  const int16_t* x;    // [R, stride]
  const float* scale;  // [R]
};
template <int B, int S>
static inline void product_int8(const Linear& l, const int16_t* x, float* y, int64_t o, int64_t apart) {
  const auto* w = (const int8_t*)l.weight + o * l.stride;
  const int64_t step = apart * l.stride;
#if defined(__AVX512BW__)
  __m512i acc[S][B];
  for (int s = 0; s < S; s++)
    for (int b = 0; b < B; b++) acc[s][b] = _mm512_setzero_si512();
  for (int64_t i = 0; i < l.stride; i += 32)
    for (int s = 0; s < S; s++) {
      if (AHEAD_INT8) __builtin_prefetch(w + s * step + i + AHEAD_INT8, 0, LOCALITY);
      const __m512i v = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)(w + s * step + i)));
      for (int b = 0; b < B; b++) {
        const __m512i a = _mm512_loadu_si512(x + b * l.stride + i);
#if defined(__AVX512VNNI__)
        acc[s][b] = _mm512_dpwssd_epi32(acc[s][b], v, a);
#else
        acc[s][b] = _mm512_add_epi32(acc[s][b], _mm512_madd_epi16(v, a));
#endif
      }
    }
  const auto lanes = [&](int s, int b) { return (vf)_mm512_cvtepi32_ps(acc[s][b]); };
#elif defined(__AVX2__)
  __m256i acc[S][B];
  for (int s = 0; s < S; s++)
    for (int b = 0; b < B; b++) acc[s][b] = _mm256_setzero_si256();
  for (int64_t i = 0; i < l.stride; i += 16)
    for (int s = 0; s < S; s++) {
      if (AHEAD_INT8) __builtin_prefetch(w + s * step + i + AHEAD_INT8, 0, LOCALITY);
      const __m256i v = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(w + s * step + i)));
      for (int b = 0; b < B; b++) {
        const __m256i a = _mm256_loadu_si256((const __m256i*)(x + b * l.stride + i));
        acc[s][b] = _mm256_add_epi32(acc[s][b], _mm256_madd_epi16(v, a));
      }
    }
  const auto lanes = [&](int s, int b) { return (vf)_mm256_cvtepi32_ps(acc[s][b]); };
#elif defined(__ARM_NEON)
  int32x4_t acc[S][B];
  for (int s = 0; s < S; s++)
    for (int b = 0; b < B; b++) acc[s][b] = vdupq_n_s32(0);
  for (int64_t i = 0; i < l.stride; i += 8)
    for (int s = 0; s < S; s++) {
      const int16x8_t v = vmovl_s8(vld1_s8(w + s * step + i));
      for (int b = 0; b < B; b++) {
        const int16x8_t a = vld1q_s16(x + b * l.stride + i);
        acc[s][b] = vmlal_s16(acc[s][b], vget_low_s16(v), vget_low_s16(a));
        acc[s][b] = vmlal_s16(acc[s][b], vget_high_s16(v), vget_high_s16(a));
      }
    }
  const auto lanes = [&](int s, int b) { return (vf)vcvtq_f32_s32(acc[s][b]); };
#else
  vi acc[S][B] = {};
  for (int64_t i = 0; i < l.stride; i += W)
    for (int s = 0; s < S; s++)
      for (int b = 0; b < B; b++)
        for (int j = 0; j < W; j++) acc[s][b][j] += (int32_t)w[s * step + i + j] * x[b * l.stride + i + j];
  const auto lanes = [&](int s, int b) { return __builtin_convertvector(acc[s][b], vf); };
#endif
  for (int b = 0; b < B; b++) {
    float sums[S];
    sum_streams<S>([&](int s) { return lanes(s, b); }, sums);
    for (int s = 0; s < S; s++) y[b * l.out + o + s * apart] = sums[s];
  }
}
template <int B, int S>
static inline void products(const Linear& l, const float* x, const Quantised& q, int row, float* y, int64_t o,
                            int64_t apart) {
  if (l.format == FP32)
    product<Fp32, B, S>(l, x + row * l.in, y + row * l.out, o, apart);
  else if (l.format == BF16)
    product<Bf16, B, S>(l, x + row * l.in, y + row * l.out, o, apart);
  else
    product_int8<B, S>(l, q.x + row * l.stride, y + row * l.out, o, apart);
}
template <int S>
static void all_rows(const Linear& l, const float* x, const Quantised& q, int rows, float* y, int64_t o,
                     int64_t apart) {
  int row = 0;
  for (; row + GROUP <= rows; row += GROUP) products<GROUP, S>(l, x, q, row, y, o, apart);
  const int left = rows - row;
  if (left == 1)
    products<1, S>(l, x, q, row, y, o, apart);
  else if (left == 2)
    products<2, S>(l, x, q, row, y, o, apart);
  else if (left == 3)
    products<3, S>(l, x, q, row, y, o, apart);
}

struct Arena {  // scratch memory of a call, in a few blocks that are kept until its end
  std::vector<std::unique_ptr<char[]>> blocks;
  std::vector<int64_t> sizes;
  struct Place {
    size_t block;
    int64_t used;
  };
  Place place = {0, 0};  // what is behind it is free
  template <class T>
  T* get(int64_t n) {
    const int64_t bytes = (n * sizeof(T) + 63) / 64 * 64;
    while (place.block < blocks.size() && place.used + bytes > sizes[place.block]) place = {place.block + 1, 0};
    if (place.block == blocks.size()) {
      sizes.push_back(std::max(bytes, (int64_t)1 << 20));
      blocks.emplace_back(new char[sizes.back() + 64]);
    }
    const auto start = (reinterpret_cast<uintptr_t>(blocks[place.block].get()) + 63) & ~(uintptr_t)63;
    place.used += bytes;
    return reinterpret_cast<T*>(start + place.used - bytes);
  }
};
static void quantise(const float* x, int64_t n, int64_t stride, int16_t* q, float* scale) {
  vf most = {};
  int64_t i = 0;
  for (; i + W <= n; i += W) {
    const vf v = load(x + i);
    most = larger(most, larger(v, -v));
  }
  float top = 1e-30f;
  for (int j = 0; j < W; j++) top = std::max(top, (float)most[j]);
  for (int64_t j = i; j < n; j++) top = std::max(top, std::fabs(x[j]));
  *scale = top / 16383.f;
  const float up = 16383.f / top;
  for (i = 0; i + W <= n; i += W) {
    const vf shifted = load(x + i) * up + 12582912.f;
    const vs v = __builtin_convertvector((vi)shifted - 0x4B400000, vs);
    std::memcpy(q + i, &v, sizeof v);
  }
  for (; i < n; i++) q[i] = (int16_t)std::nearbyintf(x[i] * up);
  for (; i < stride; i++) q[i] = 0;
}

// y [R, out] of x [R, in].
static void linear(Pool& pool, Arena& arena, const Linear& l, const float* x, int rows, float* y) {
  Quantised q = {};
  if (l.format == INT8) {
    auto* values = arena.get<int16_t>(rows * l.stride);
    auto* scale = arena.get<float>(rows);
    for (int row = 0; row < rows; row++) quantise(x + row * l.in, l.in, l.stride, values + row * l.stride, scale + row);
    q = {values, scale};
  }
  const int64_t apart = l.out / STREAMS;
  share(pool, apart, l.out * l.in >= 65536, [&](int64_t first, int64_t end) {
    for (int64_t o = first; o < end; o++) all_rows<STREAMS>(l, x, q, rows, y, o, apart);
  });
  for (int64_t o = apart * STREAMS; o < l.out; o++) all_rows<1>(l, x, q, rows, y, o, 0);
  for (int row = 0; row < rows; row++) {
    float* out = y + row * l.out;
    if (l.format == INT8) map(out, l.out, out, l.scale, [&](vf v, vf scale) { return v * (scale * q.scale[row]); });
    if (l.bias) map(out, l.out, out, l.bias, [](vf v, vf bias) { return v + bias; });
  }
}

// ---- sublayers ----
static void normalise(int64_t kind, const float* x, const float* weight, const float* bias, float* y, int64_t n) {
  if (kind == NONE) {
    std::memcpy(y, x, n * sizeof(float));
    return;
  }
  if (kind == RMS) {
    const float scale = 1.f / std::sqrt(sum_squares(x, n) / n + 1e-5f);
    map(y, n, x, weight, [&](vf v, vf w) { return v * scale * w; });
    return;
  }
  vf acc = {};
  int64_t i = 0;
  for (; i + W <= n; i += W) acc += load(x + i);
  float mean = total(acc);
  for (; i < n; i++) mean += x[i];
  mean /= n;
  map(y, n, x, x, [&](vf v, vf) { return v - mean; });
  const float scale = 1.f / std::sqrt(sum_squares(y, n) / n + 1e-5f);
  map(y, n, y, weight, [&](vf v, vf w) { return v * scale * w; });
  map(y, n, y, bias, [&](vf v, vf b) { return v + b; });
}
// The causal convolution's step with SiLU: past [taps - 1, C], oldest first, takes in x [C]; y [C]. Of n channels, the
// first of which all pointers but those of `l` are at.
static void convolve(const Sublayer& l, int64_t first, int64_t n, float* past, const float* x, float* y) {
  const int64_t C = l.channels, last = l.taps - 1;
  const float* w = l.conv_weight + first;
  map(y, n, x, w + last * C, [](vf v, vf a) { return v * a; });
  for (int64_t k = 0; k < last; k++) {
    const float* column = past + k * C;
    int64_t c = 0;
    for (; c + W <= n; c += W) store(y + c, load(y + c) + load(column + c) * load(w + k * C + c));
    for (; c < n; c++) y[c] += column[c] * w[k * C + c];
  }
  if (l.conv_bias) map(y, n, y, l.conv_bias + first, [](vf v, vf b) { return v + b; });
  map(y, n, y, y, [](vf v, vf) { return silu(v); });
  for (int64_t k = 0; k < last; k++)
    std::memcpy(past + k * C, k + 1 < last ? past + (k + 1) * C : x, n * sizeof(float));
}
// For S rows of a state [S, n]: state = decay * state + u * b, and y = the sum of state * c.
template <int S, bool BY_ROW = STATE_BY_ROW>
static inline void update_dot(float* state, const float* b, const float* c, float decay, const float* u, int64_t n,
                              float* y) {
  vf acc[S] = {};
  const int64_t whole = n / W * W;
  const auto update = [&](int s, int64_t i) {
    if (AHEAD_STATE) __builtin_prefetch((const char*)(state + s * n + i) + AHEAD_STATE, 1);
    const vf v = load(state + s * n + i) * decay + load(b + i) * u[s];
    store(state + s * n + i, v);
    acc[s] += v * load(c + i);
  };
  if (BY_ROW) {
    for (int s = 0; s < S; s++)
      for (int64_t i = 0; i < whole; i += W) update(s, i);
  } else {
    for (int64_t i = 0; i < whole; i += W)
      for (int s = 0; s < S; s++) update(s, i);
  }
  sum_streams<S>([&](int s) { return acc[s]; }, y);
  for (int64_t i = whole; i < n; i++)
    for (int s = 0; s < S; s++) {
      state[s * n + i] = state[s * n + i] * decay + b[i] * u[s];
      y[s] += state[s * n + i] * c[i];
    }
}
// The scan of Mamba-2 over T positions of one row and head: x [T, P], dt [T], B and C [T, N], whose positions lie apart
// by the strides, and state [P, N] -> y [T, P]. A head's state stays in the nearest cache.
struct Scan {
  int64_t length, heads, headdim, groups, d_state;
  int64_t x_stride, bc_stride;  // from position to position
};
static void scan_head(const Scan& l, const float* x, const float* dt, float A, const float* B, const float* C, float D,
                      float* state, float* y) {
  const int64_t P = l.headdim, N = l.d_state;
  for (int64_t t = 0; t < l.length; t++) {
    const float step = dt[t * l.heads], decay = std::exp(step * A);
    float u[4];
    int64_t p = 0;
    for (; p + 4 <= P; p += 4) {
      for (int s = 0; s < 4; s++) u[s] = step * x[p + s];
      update_dot<4, false>(state + p * N, B, C, decay, u, N, y + p);
    }
    for (; p < P; p++) u[0] = step * x[p], update_dot<1>(state + p * N, B, C, decay, u, N, y + p);
    add_scaled(y, x, D, P);
    x += l.x_stride, B += l.bc_stride, C += l.bc_stride, y += l.heads * P;
  }
}
// One row of a Mamba-2 mixer between its projections: u [z, x, B, C, dt] -> y [I].
static void mamba2(const Sublayer& l, const float* u, float* conv, float* ssm, float* xBC, float* dt, float* y) {
  const int64_t I = l.inner, N = l.d_state, P = l.headdim, heads_per_group = l.heads / l.groups;
  convolve(l, 0, l.channels, conv, u + I, xBC);
  map(dt, l.heads, u + I + l.channels, l.dt_bias, [](vf v, vf b) { return softplus(v + b); });
  for (int64_t h = 0; h < l.heads; h++) {
    const float* B = xBC + I + h / heads_per_group * N;
    const float decay = std::exp(dt[h] * l.A[h]);
    const float* C = B + l.groups * N;
    float u[4];
    int64_t p = h * P;
    for (; p + 4 <= (h + 1) * P; p += 4) {
      for (int s = 0; s < 4; s++) u[s] = dt[h] * xBC[p + s];
      update_dot<4>(ssm + p * N, B, C, decay, u, N, y + p);
    }
    for (; p < (h + 1) * P; p++) u[0] = dt[h] * xBC[p], update_dot<1>(ssm + p * N, B, C, decay, u, N, y + p);
    add_scaled(y + h * P, xBC + h * P, l.D[h], P);
  }
  map(y, I, y, u, [](vf v, vf z) { return v * silu(z); });
  const int64_t width = I / l.groups;
  for (int64_t g = 0; g < l.groups; g++)
    normalise(RMS, y + g * width, l.gate_norm + g * width, nullptr, y + g * width, width);
}
// One row of a Mamba-1 mixer's scan and gate: x [I], dt [I] before its bias, bc [B, C], z [I] -> y [I].
static void mamba1(const Sublayer& l, const float* x, const float* dt, const float* bc, const float* z, float* ssm,
                   float* t, float* y) {
  const int64_t I = l.inner, N = l.d_state;
  map(t, I, dt, l.dt_bias, [](vf v, vf b) { return softplus(v + b); });
  for (int64_t i = 0; i < I; i++) {
    float* state = ssm + i * N;
    const float* A = l.A + i * N;
    const float u = t[i] * x[i];
    vf acc = {};
    int64_t n = 0;
    for (; n + W <= N; n += W) {
      const vf v = load(state + n) * exp_(load(A + n) * t[i]) + load(bc + n) * u;
      store(state + n, v);
      acc += v * load(bc + N + n);
    }
    float sum = total(acc);
    for (; n < N; n++) {
      state[n] = state[n] * std::exp(A[n] * t[i]) + bc[n] * u;
      sum += state[n] * bc[N + n];
    }
    y[i] = sum + l.D[i] * x[i];
  }
  map(y, I, y, z, [](vf v, vf g) { return v * silu(g); });
}
// scores [n] -> their softmax.
static void softmax(float* scores, int64_t n) {
  float top = scores[0];
  for (int64_t i = 1; i < n; i++) top = std::max(top, scores[i]);
  map(scores, n, scores, scores, [&](vf v, vf) { return exp_(v - top); });
  vf acc = {};
  int64_t i = 0;
  for (; i + W <= n; i += W) acc += load(scores + i);
  float sum = total(acc);
  for (; i < n; i++) sum += scores[i];
  const float scale = 1.f / sum;
  map(scores, n, scores, scores, [&](vf v, vf) { return v * scale; });
}
// Rotary positions of one row, x [H, P]: pair i is rotated by position * 10000^(-2i/P).
static void rotate(float* x, int64_t heads, int64_t P, int64_t position) {
  for (int64_t i = 0; i < P / 2; i++) {
    const float angle = (float)position * std::pow(10000.f, -(float)i / (float)(P / 2));
    const float c = std::cos(angle), s = std::sin(angle);
    for (int64_t h = 0; h < heads; h++) {
      float *even = x + h * P + 2 * i, *odd = even + 1, e = *even, o = *odd;
      *even = e * c - o * s;
      *odd = o * c + e * s;
    }
  }
}
// One row of self-attention: q [H, P] and the cache [S, H, P] with n valid slots -> y [H, P]; scores [H, n].
static void attend(const Sublayer& l, const float* q, const float* keys, const float* values, int64_t n, float* scores,
                   float* y) {
  const int64_t H = l.heads, P = l.headdim;
  const float scale = 1.f / std::sqrt((float)P);
  for (int64_t s = 0; s < n; s++)
    for (int64_t h = 0; h < H; h++) scores[h * n + s] = scale * dot(q + h * P, keys + (s * H + h) * P, P);
  for (int64_t h = 0; h < H; h++) softmax(scores + h * n, n);
  std::memset(y, 0, H * P * sizeof(float));
  for (int64_t s = 0; s < n; s++)
    for (int64_t h = 0; h < H; h++) add_scaled(y + h * P, values + (s * H + h) * P, scores[h * n + s], P);
}
// One row of cross-attention: q [H, P], keys and values [H, S, P], mask [S] -> y [H, P]; 0 without a valid token.
static void attend_text(const Sublayer& l, const float* q, const float* keys, const float* values, const uint8_t* mask,
                        int64_t S, float* scores, float* y) {
  const int64_t H = l.heads, P = l.headdim;
  const float scale = 1.f / std::sqrt((float)P);
  std::memset(y, 0, H * P * sizeof(float));
  for (int64_t h = 0; h < H; h++) {
    int64_t n = 0;
    for (int64_t s = 0; s < S; s++)
      if (mask[s]) scores[n++] = scale * dot(q + h * P, keys + (h * S + s) * P, P);
    if (n == 0) return;
    softmax(scores, n);
    n = 0;
    for (int64_t s = 0; s < S; s++)
      if (mask[s]) add_scaled(y + h * P, values + (h * S + s) * P, scores[n++], P);
  }
}
// A sublayer's function h [R, D] -> h [R, D], between norm and residual.
static void apply(Pool& pool, Arena& arena, const Sublayer& l, const State& state, float* h, int64_t D, int rows) {
  const Linear* m = l.linears;
  if (l.kind == MLP) {
    auto* u = arena.get<float>(rows * m[0].out);
    linear(pool, arena, m[0], h, rows, u);
    map(u, rows * m[0].out, u, u, [](vf v, vf) { return gelu(v); });
    linear(pool, arena, m[1], u, rows, h);
  } else if (l.kind == MAMBA2) {
    auto *u = arena.get<float>(rows * m[0].out), *y = arena.get<float>(rows * l.inner);
    auto *xBC = arena.get<float>(l.channels), *dt = arena.get<float>(l.heads);
    linear(pool, arena, m[0], h, rows, u);
    for (int r = 0; r < rows; r++) {
      float *conv = state.first + r * (l.taps - 1) * l.channels, *ssm = state.second + r * l.inner * l.d_state;
      mamba2(l, u + r * m[0].out, conv, ssm, xBC, dt, y + r * l.inner);
    }
    linear(pool, arena, m[1], y, rows, h);
  } else if (l.kind == MAMBA1) {
    const int64_t I = l.inner, projected = m[2].out;
    auto *xz = arena.get<float>(rows * 2 * I), *x = arena.get<float>(rows * I), *y = arena.get<float>(rows * I);
    auto *operands = arena.get<float>(rows * projected), *rank = arena.get<float>(rows * l.dt_rank);
    auto *dt = arena.get<float>(rows * I), *t = arena.get<float>(I);
    linear(pool, arena, m[0], h, rows, xz);
    for (int r = 0; r < rows; r++) convolve(l, 0, I, state.first + r * (l.taps - 1) * I, xz + r * 2 * I, x + r * I);
    linear(pool, arena, m[2], x, rows, operands);
    for (int r = 0; r < rows; r++)
      std::memcpy(rank + r * l.dt_rank, operands + r * projected, l.dt_rank * sizeof(float));
    linear(pool, arena, m[3], rank, rows, dt);
    for (int r = 0; r < rows; r++)
      mamba1(l, x + r * I, dt + r * I, operands + r * projected + l.dt_rank, xz + r * 2 * I + I,
             state.second + r * I * l.d_state, t, y + r * I);
    linear(pool, arena, m[1], y, rows, h);
  } else {
    auto *q = arena.get<float>(rows * D), *y = arena.get<float>(rows * D);
    linear(pool, arena, m[0], h, rows, q);
    if (l.kind == ATTENTION) {
      auto *k = arena.get<float>(rows * D), *v = arena.get<float>(rows * D);
      linear(pool, arena, m[1], h, rows, k);
      linear(pool, arena, m[2], h, rows, v);
      for (int r = 0; r < rows; r++) {
        const int64_t position = state.lengths[r]++;
        float *keys = state.first + r * state.slots * D, *values = state.second + r * state.slots * D;
        if (l.rotary) rotate(q + r * D, l.heads, l.headdim, position), rotate(k + r * D, l.heads, l.headdim, position);
        std::memcpy(keys + position * D, k + r * D, D * sizeof(float));
        std::memcpy(values + position * D, v + r * D, D * sizeof(float));
        attend(l, q + r * D, keys, values, position + 1, arena.get<float>(l.heads * (position + 1)), y + r * D);
      }
    } else {
      auto* scores = arena.get<float>(state.slots);
      for (int r = 0; r < rows; r++)
        attend_text(l, q + r * D, state.first + r * state.slots * D, state.second + r * state.slots * D,
                    state.mask + r * state.slots, state.slots, scores, y + r * D);
    }
    linear(pool, arena, m[3], y, rows, h);
  }
}

// ---- the step ----
// codes [R, K], added [R, D] or null (controls and positions, added to the embedding) -> logits [R, K * V']. Does
// nothing and returns false if a code has no embedding.
static bool run_step(Pool& pool, Arena& arena, const Model& m, const State* states, const int64_t* codes,
                     const float* added, float* logits, int rows) {
  const int64_t D = m.d_model;
  for (int64_t i = 0; i < rows * m.n_codebooks; i++)
    if (codes[i] < 0 || codes[i] >= m.embedding_rows) return false;
  arena.place = {0, 0};
  auto *x = arena.get<float>(rows * D), *h = arena.get<float>(rows * D);
  for (int r = 0; r < rows; r++) {
    float* row = x + r * D;
    if (added)
      std::memcpy(row, added + r * D, D * sizeof(float));
    else
      std::memset(row, 0, D * sizeof(float));
    for (int64_t k = 0; k < m.n_codebooks; k++)
      add_scaled(row, m.embedding + (k * m.embedding_rows + codes[r * m.n_codebooks + k]) * D, 1.f, D);
  }
  const Arena::Place behind = arena.place;
  for (int64_t j = 0; j < m.n_sublayers; j++) {
    arena.place = behind;  // every sublayer uses the same memory
    const Sublayer& l = m.sublayers[j];
    const State& state = states[j];
    for (int r = 0; r < rows; r++) {
      normalise(l.norm, x + r * D, l.norm_weight, l.norm_bias, h + r * D, D);
      if (!state.adaln) continue;
      const float *shift = state.adaln + r * 3 * D, *scale = shift + D;
      map(h + r * D, D, h + r * D, scale, [](vf v, vf s) { return v * s; });
      map(h + r * D, D, h + r * D, shift, [](vf v, vf s) { return v + s; });
    }
    apply(pool, arena, l, state, h, D, rows);
    for (int r = 0; r < rows; r++) {
      float* y = h + r * D;
      if (state.adaln) map(y, D, y, state.adaln + r * 3 * D + 2 * D, [](vf v, vf g) { return v * g; });
      if (l.layer_scale) map(y, D, y, l.layer_scale, [](vf v, vf s) { return v * s; });
      add_scaled(x + r * D, y, 1.f, D);
    }
  }
  for (int r = 0; r < rows; r++) normalise(m.norm, x + r * D, m.norm_weight, m.norm_bias, h + r * D, D);
  linear(pool, arena, m.heads, h, rows, logits);
  return true;
}

// ---- the draw ----
// Bits of a float in an order that compares as the float does.
static inline vi ordered(vf x) {
  const vi bits = (vi)x;
  return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}
static int64_t count_from(const int32_t* keys, int64_t n, int32_t threshold) {  // n is a multiple of W
  vi count = {};
  for (int64_t i = 0; i < n; i += W) {
    vi v;
    std::memcpy(&v, keys + i, sizeof v);
    count -= v >= threshold;
  }
  return sum_lanes(count);
}
// A threshold that the k largest of n keys reach, and those equal to the k-th: found bit by bit from the sign down.
static int32_t threshold_of(const int32_t* keys, int64_t n, int64_t k) {
  int64_t best = INT32_MIN;
  for (int bit = 31; bit >= 0; bit--) {
    const int64_t next = best + ((int64_t)1 << bit);
    const int64_t count = count_from(keys, n, (int32_t)next);
    if (count >= k) best = next;
    if (count == k) break;
  }
  return (int32_t)best;
}
// e^x to a unit in the last place, x <= 0 (Cephes' exp); below -708 it is 0.
static inline vd exp_(vd x) {
  const vl gone = x < -708.;
  x = gone ? vd{} : x;
  const vd shifted = x * 1.4426950408889634 + 6755399441055744.;
  const vd n = shifted - 6755399441055744.;
  const vd r = (x - n * 6.93145751953125e-1) - n * 1.42860682030941723212e-6;
  const vd s = r * r;
  const vd p = r * ((s * 1.26177193074810590878e-4 + 3.02994407707441961300e-2) * s + 9.99999999999999999910e-1);
  const vd q = ((s * 3.00198505138664455042e-6 + 2.52448340349684104192e-3) * s + 2.27265548208155028766e-1) * s + 2.;
  const vd y = 1. + 2. * p / (q - p);
  const vd result = (vd)((vl)y + (((vl)shifted - (vl)(vd{} + 6755399441055744.)) << 52));
  return gone ? vd{} : result;
}
struct Candidates {  // codes that may be drawn, in their order; room for V + W
  float* logits;
  double* weights;
  int64_t* codes;
  int64_t n;
};
// weights = exp(logits - top).
static void exponentials(const Candidates& c, float top) {
  constexpr int half = W / 2;
  for (int64_t i = 0; i < c.n; i += half) {
    vhalf v;
    std::memcpy(&v, c.logits + i, sizeof v);
    const vd e = exp_(__builtin_convertvector(v, vd) - (double)top);
    std::memcpy(c.weights + i, &e, sizeof e);
  }
}
// Keep the candidates whose logit is at least `least`.
static void keep_from(Candidates& c, float least) {
  int64_t kept = 0;
  for (int64_t i = 0; i < c.n; i++)
    if (c.logits[i] >= least) {
      c.logits[kept] = c.logits[i], c.weights[kept] = c.weights[i], c.codes[kept] = c.codes[i];
      kept++;
    }
  c.n = kept;
}
// Keep the most likely candidates that reach probability p.
static void keep_nucleus(Candidates& c, double p, std::vector<std::pair<float, double>>& order) {
  order.clear();
  double sum = 0;
  for (int64_t i = 0; i < c.n; i++) order.push_back({c.logits[i], c.weights[i]}), sum += c.weights[i];
  const auto less = [](const auto& a, const auto& b) { return a.first < b.first; };
  std::make_heap(order.begin(), order.end(), less);  // the first few are enough: no need to sort all
  double before = 0;
  float least = order.front().first;
  for (auto end = order.end(); end != order.begin() && before / sum < p; end--) {
    std::pop_heap(order.begin(), end, less);
    least = end[-1].first;
    before += end[-1].second;
  }
  keep_from(c, least);
}
static void run_draw(Arena& arena, const Draw& d, const float* logits, int64_t items, const double* uniforms,
                     int64_t* codes) {
  const int64_t V = d.codebook_size, padded = (V + W - 1) / W * W;
  arena.place = {0, 0};
  auto* values = arena.get<float>(padded);
  auto* keys = arena.get<int32_t>(padded);
  Candidates c = {arena.get<float>(padded + W), arena.get<double>(padded + W), arena.get<int64_t>(padded + W), 0};
  std::vector<std::pair<float, double>> order;
  const bool filtered = d.top_k > 0 && d.top_k < V;
  for (int64_t i = 0; i < items * d.n_codebooks; i++) {
    const float* row = logits + i * d.n_logits;
    if (d.guided) {  // null + scale * (conditional - null), as torch.lerp computes it
      const float* null = row + items * d.n_codebooks * d.n_logits;
      const float s = d.guidance_scale;
      if (std::fabs(s) < 0.5f)
        map(values, V, row, null, [&](vf a, vf b) { return b + s * (a - b); });
      else
        map(values, V, row, null, [&](vf a, vf b) { return a - (a - b) * (1.f - s); });
    } else {
      std::memcpy(values, row, V * sizeof(float));
    }
    if (d.temperature != 1.f) map(values, V, values, values, [&](vf v, vf) { return v / d.temperature; });
    for (int64_t j = V; j < padded; j++) values[j] = -INFINITY;
    vf most = splat(-INFINITY);
    for (int64_t j = 0; j < padded; j += W) {
      const vf v = load(values + j);
      const vi key = ordered(v);
      std::memcpy(keys + j, &key, sizeof key);
      most = larger(most, v);
    }
    float top = most[0];
    for (int j = 1; j < W; j++) top = std::max(top, (float)most[j]);
    const int32_t least = filtered ? threshold_of(keys, padded, d.top_k) : INT32_MIN;
    c.n = 0;
    for (int64_t j = 0; j < V; j++) {  // without a branch: a kept code is not overwritten by the next
      c.logits[c.n] = values[j];
      c.codes[c.n] = j;
      c.n += keys[j] >= least;
    }
    for (int j = 0; j < W; j++) c.logits[c.n + j] = -INFINITY;
    exponentials(c, top);
    if (d.top_p < 1.) keep_nucleus(c, d.top_p, order);
    if (d.min_p > 0.) keep_from(c, top + (float)std::log(d.min_p));
    double sum = 0;
    for (int64_t j = 0; j < c.n; j++) c.weights[j] = sum += c.weights[j];
    const double target = uniforms[i] * sum;
    const int64_t drawn = std::upper_bound(c.weights, c.weights + c.n, target) - c.weights;
    codes[i] = c.codes[std::min(drawn, c.n - 1)];
  }
}

// ---- C ABI ----
extern "C" {
int64_t ssmttm_size(int which) {  // of the structs, to compare with those of the caller
  const int64_t sizes[] = {sizeof(Linear), sizeof(Sublayer), sizeof(State), sizeof(Model), sizeof(Draw)};
  return sizes[which];
}
void* ssmttm_open(int threads) { return new Pool(threads); }
void ssmttm_close(void* pool) { delete (Pool*)pool; }
// codes [R, K], added [R, D] or null -> logits [R, K, V']. Returns 0, or 1 if a code has no embedding.
int ssmttm_step(void* pool, const Model* model, const State* states, const int64_t* codes, const float* added,
                float* logits, int rows) {
  Arena arena;
  return run_step(*(Pool*)pool, arena, *model, states, codes, added, logits, rows) ? 0 : 1;
}
// logits [R, K, V']: the first `items` rows are conditional and, if guided, the next `items` null; uniforms and codes
// [items, K].
void ssmttm_draw(const Draw* draw, const float* logits, int64_t items, const double* uniforms, int64_t* codes) {
  Arena arena;
  run_draw(arena, *draw, logits, items, uniforms, codes);
}
// n positions: a step on the codes before (last [items, K]; null: the first position's logits are given), then a draw.
// added is null, or [R, D] of the first step, `stride` floats before that of the next; known [n, items, K] holds known
// codes and -1. Row r belongs to item r % items. Writes codes [n, items, K] and leaves the last logits. Returns 0, or 1
// if a code has no embedding.
int ssmttm_run(void* pool, const Model* model, const State* states, const Draw* draw, const int64_t* last,
               const float* added, int64_t stride, const int64_t* known, const double* uniforms, int64_t n,
               int64_t items, int rows, float* logits, int64_t* codes) {
  const int64_t K = model->n_codebooks, size = items * K;
  Arena arena;
  std::vector<int64_t> of_rows(rows * K);
  for (int64_t i = 0; i < n; i++) {
    if (last) {
      for (int64_t r = 0; r < rows; r++) std::copy_n(last + r % items * K, K, of_rows.begin() + r * K);
      if (!run_step(*(Pool*)pool, arena, *model, states, of_rows.data(), added, logits, rows)) return 1;
      if (added) added += stride;
    }
    int64_t* found = codes + i * size;
    run_draw(arena, *draw, logits, items, uniforms + i * size, found);
    for (int64_t j = 0; j < size; j++)
      if (known[i * size + j] >= 0) found[j] = known[i * size + j];
    last = found;
  }
  return 0;
}
// The causal convolution of T positions with SiLU: x [R, T, C] with the given strides, weight [taps, C], bias [C] or null
// and past [R, taps - 1, C], which takes in the last inputs -> y [R, T, C].
void ssmttm_convolve(void* pool, const float* weight, const float* bias, int64_t taps, int64_t channels, float* past,
                     const float* x, int64_t row_stride, int64_t stride, int64_t rows, int64_t length, float* y) {
  Sublayer l = {};
  l.conv_weight = weight, l.conv_bias = bias, l.taps = taps, l.channels = channels;
  const int64_t vectors = (channels + W - 1) / W;
  share(*(Pool*)pool, vectors, rows * length * taps * channels >= WORTH_WAKING, [&](int64_t first, int64_t end) {
    first *= W, end = std::min(channels, end * W);
    for (int64_t r = 0; r < rows; r++)
      for (int64_t t = 0; t < length; t++)
        convolve(l, first, end - first, past + r * (taps - 1) * channels + first,
                 x + r * row_stride + t * stride + first, y + (r * length + t) * channels + first);
  });
}
// The scan of Mamba-2: x [R, T, H, P], dt [R, T, H], B and C [R, T, G, N], D [H] or null, and state [R, H, P, N], which
// takes the final one -> y [R, T, H, P]. Positions of x, B and C lie apart by the strides of `scan`, rows T times that.
void ssmttm_scan(void* pool, const Scan* scan, const float* x, const float* dt, const float* A, const float* B,
                 const float* C, const float* D, float* state, int64_t rows, float* y) {
  const Scan& l = *scan;
  const int64_t T = l.length, H = l.heads, P = l.headdim, N = l.d_state;
  share(*(Pool*)pool, rows * H, rows * T * H * P * N >= WORTH_WAKING, [&](int64_t first, int64_t end) {
    for (int64_t i = first; i < end; i++) {
      const int64_t r = i / H, h = i % H, bc = r * T * l.bc_stride + h / (H / l.groups) * N;
      scan_head(l, x + r * T * l.x_stride + h * P, dt + r * T * H + h, A[h], B + bc, C + bc, D ? D[h] : 0.f,
                state + i * P * N, y + (r * T * H + h) * P);
    }
  });
}
float ssmttm_read(const float* p, int64_t n) {  // reads n floats in four streams: the limit that a step is measured by
  vf acc[4][2] = {};
  const int64_t part = n / 4;
  for (int64_t i = 0; i + 2 * W <= part; i += 2 * W)
    for (int s = 0; s < 4; s++)
      for (int j = 0; j < 2; j++) acc[s][j] += load(p + s * part + i + j * W);
  float sum = 0;
  for (int s = 0; s < 4; s++) sum += total(acc[s][0] + acc[s][1]);
  return sum;
}
}

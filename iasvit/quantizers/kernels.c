// Fake quantization in one pass over memory. Only +, -, *, / and rounding of IEEE floats, each for itself, so that every
// value has the bits that torch's operators give it.
#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__)
#define VECTOR 64 // bytes
#elif defined(__AVX2__)
#define VECTOR 32
#endif
#ifdef VECTOR
#include <immintrin.h>
#endif

static inline float round_trip(float x, float s, float z, float top) {
    float code = rintf(x / s) + z;
    code = code < 0.0f ? 0.0f : code; // NaN stays NaN
    code = code > top ? top : code;
    return (code - z) * s;
}

// How far rounding moves a value: half a step, and what float32 adds.
static inline float reach(float s) {
    return s / 2.0f * (float)(1 + 1e-5);
}

// A scale for each of `channels` runs of `inner` values, and that `outer` times. `inside`, which may be NULL: whether
// rounding is all that happened to a value.
void uniform_runs(const float *restrict x, const float *restrict s, const int32_t *restrict z, float top,
                  int64_t outer, int64_t channels, int64_t inner, float *restrict values, uint8_t *restrict inside) {
    for (int64_t run = 0; run < outer * channels; run++) {
        const float scale = s[run % channels], zero = (float)z[run % channels], far = reach(scale);
        const float *from = x + run * inner;
        float *to = values + run * inner;
        if (inside) {
            uint8_t *in = inside + run * inner;
            for (int64_t i = 0; i < inner; i++) {
                const float value = round_trip(from[i], scale, zero, top);
                in[i] = fabsf(from[i] - value) <= far;
                to[i] = value;
            }
        } else
            for (int64_t i = 0; i < inner; i++) to[i] = round_trip(from[i], scale, zero, top);
    }
}

// Steps of `fine` below `limit`, and of `coarse` from it on.
void twin(const float *restrict x, float fine, float coarse, float limit, float z, float top, int64_t count,
          float *restrict values, uint8_t *restrict inside) {
    if (inside)
        for (int64_t i = 0; i < count; i++) {
            const float s = x[i] < limit ? fine : coarse, value = round_trip(x[i], s, z, top);
            inside[i] = fabsf(x[i] - value) <= reach(s);
            values[i] = value;
        }
    else
        for (int64_t i = 0; i < count; i++) values[i] = round_trip(x[i], x[i] < limit ? fine : coarse, z, top);
}

// A scale for each of `channels` values that lie side by side, and that `outer` times.
void uniform_columns(const float *restrict x, const float *restrict s, const int32_t *restrict z, float top,
                     int64_t outer, int64_t channels, float *restrict values, uint8_t *restrict inside) {
    for (int64_t row = 0; row < outer; row++) {
        const float *from = x + row * channels;
        float *to = values + row * channels;
        if (inside) {
            uint8_t *in = inside + row * channels;
            for (int64_t i = 0; i < channels; i++) {
                const float value = round_trip(from[i], s[i], (float)z[i], top);
                in[i] = fabsf(from[i] - value) <= reach(s[i]);
                to[i] = value;
            }
        } else
            for (int64_t i = 0; i < channels; i++) to[i] = round_trip(from[i], s[i], (float)z[i], top);
    }
}

// gradient * inside.
void masked(const float *restrict gradient, const uint8_t *restrict inside, int64_t count, float *restrict out) {
    for (int64_t i = 0; i < count; i++) out[i] = gradient[i] * (float)inside[i];
}

typedef struct {
    const float *thresholds, *values;
    float shift, slope, offset, top, least;
} table;

static int look_up_plain(const float *restrict x, const table *t, int64_t count, float *restrict values) {
    enum { PART = 256 };
    int32_t near[PART];
    int unknown = 0;
    for (int64_t start = 0; start < count; start += PART) {
        const int64_t end = start + PART < count ? start + PART : count;
        for (int64_t i = start; i < end; i++) {
            const float shifted = x[i] + t->shift;
            int32_t bits;
            memcpy(&bits, &shifted, sizeof bits);
            float line = (float)bits * t->slope + t->offset;
            line = line > 0.0f ? line : 0.0f; // NaN is 0
            near[i - start] = (int32_t)(line < t->top ? line : t->top);
            unknown |= !(x[i] >= t->least);
        }
        for (int64_t i = start; i < end; i++) {
            int64_t at = near[i - start];
            __asm__("" : "+r"(at)); // no gather, which is slower than loads
            values[i] = t->values[at + (x[i] >= t->thresholds[at])];
        }
    }
    return unknown;
}

#ifdef VECTOR
typedef int32_t ints __attribute__((vector_size(VECTOR)));
typedef float floats __attribute__((vector_size(VECTOR)));
enum { WIDTH = sizeof(ints) / sizeof(int32_t) };

#if VECTOR == 64
// table[at] for each of WIDTH indices; `size` is a multiple of 32.
static inline floats pick(const float *table, ints at, int size) {
    __m512 found = _mm512_permutex2var_ps(_mm512_loadu_ps(table), (__m512i)at, _mm512_loadu_ps(table + 16));
    for (int from = 32; from < size; from += 32) {
        const float *part = table + from;
        const __m512 next = _mm512_permutex2var_ps(_mm512_loadu_ps(part), (__m512i)at, _mm512_loadu_ps(part + 16));
        found = _mm512_mask_mov_ps(found, _mm512_cmpge_epi32_mask((__m512i)at, _mm512_set1_epi32(from)), next);
    }
    return (floats)found;
}

// Within [0, top]; 0 for NaN.
static inline floats cut(floats x, floats top) {
    return (floats)_mm512_min_ps(_mm512_max_ps((__m512)x, _mm512_setzero_ps()), (__m512)top);
}
#else
static inline floats pick(const float *table, ints at, int size) {
    __m256 found = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)at);
    for (int from = 8; from < size; from += 8) {
        const __m256 next = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + from), (__m256i)at);
        found = _mm256_blendv_ps(found, next, (__m256)(at >= from));
    }
    return (floats)found;
}

static inline floats cut(floats x, floats top) {
    return (floats)_mm256_min_ps(_mm256_max_ps((__m256)x, _mm256_setzero_ps()), (__m256)top);
}
#endif

// The index of each x, or the one before it.
static inline ints near(floats x, const table *t) {
    const floats zero = {0}, shifted = x + t->shift;
    const floats line = __builtin_convertvector((ints)shifted, floats) * t->slope + t->offset;
    return __builtin_convertvector(cut(line, zero + t->top), ints);
}

static inline ints look_up_few(const float *from, const table *t, int size, float *to) {
    floats x;
    memcpy(&x, from, sizeof x);
    ints at = near(x, t);
    at -= x >= pick(t->thresholds, at, size); // true is -1
    const floats value = pick(t->values, at, size);
    memcpy(to, &value, sizeof value);
    return ~(x >= t->least);
}

#ifdef __AVX512VBMI__
// 256 floats, byte by byte: 3 permutations find a byte of 64 of them at once.
typedef struct {
    uint8_t of[sizeof(float)][256];
} planes;

static inline planes planes_of(const float *table) {
    planes result;
    for (int i = 0; i < 256; i++)
        for (size_t byte = 0; byte < sizeof(float); byte++) result.of[byte][i] = ((const uint8_t *)(table + i))[byte];
    return result;
}

static inline __m512i pick_bytes(const uint8_t *plane, __m512i at) {
    const __m512i *part = (const __m512i *)plane;
    const __m512i low = _mm512_permutex2var_epi8(_mm512_loadu_si512(part), at, _mm512_loadu_si512(part + 1));
    const __m512i high = _mm512_permutex2var_epi8(_mm512_loadu_si512(part + 2), at, _mm512_loadu_si512(part + 3));
    return _mm512_mask_blend_epi8(_mm512_movepi8_mask(at), low, high);
}

static inline void pick_many(const planes *table, const ints at[4], floats found[4]) {
    const __m512i first = _mm512_packs_epi32((__m512i)at[0], (__m512i)at[1]);
    const __m512i bytes = _mm512_packus_epi16(first, _mm512_packs_epi32((__m512i)at[2], (__m512i)at[3]));
    const __m512i a = pick_bytes(table->of[0], bytes), b = pick_bytes(table->of[1], bytes);
    const __m512i c = pick_bytes(table->of[2], bytes), d = pick_bytes(table->of[3], bytes);
    const __m512i low[2] = {_mm512_unpacklo_epi8(a, b), _mm512_unpackhi_epi8(a, b)};
    const __m512i high[2] = {_mm512_unpacklo_epi8(c, d), _mm512_unpackhi_epi8(c, d)};
    for (int half = 0; half < 2; half++) {
        found[2 * half] = (floats)_mm512_unpacklo_epi16(low[half], high[half]);
        found[2 * half + 1] = (floats)_mm512_unpackhi_epi16(low[half], high[half]);
    }
}

static inline ints look_up_many(const float *from, const table *t, const planes *thresholds, const planes *values,
                                float *to) {
    floats x[4], found[4];
    ints at[4], unknown = {0};
    memcpy(x, from, sizeof x);
    for (int i = 0; i < 4; i++) at[i] = near(x[i], t);
    pick_many(thresholds, at, found);
    for (int i = 0; i < 4; i++) at[i] -= x[i] >= found[i], unknown |= ~(x[i] >= t->least);
    pick_many(values, at, found);
    memcpy(to, found, sizeof found);
    return unknown;
}
#endif

static inline __attribute__((always_inline)) int look_up_all(const float *x, const table *t, int size, int64_t count,
                                                             float *values) {
#if VECTOR == 32
    if (size > 32) return look_up_plain(x, t, count, values); // so many permutations take longer
#endif
    ints unknown = {0};
    int64_t i = 0;
#ifdef __AVX512VBMI__
    if (size == 256) {
        const planes thresholds = planes_of(t->thresholds), of_values = planes_of(t->values);
        for (; i + 4 * WIDTH <= count; i += 4 * WIDTH)
            unknown |= look_up_many(x + i, t, &thresholds, &of_values, values + i);
    }
#endif
    for (; i + WIDTH <= count; i += WIDTH) unknown |= look_up_few(x + i, t, size, values + i);
    if (count % WIDTH) unknown |= look_up_few(x + count - WIDTH, t, size, values + count - WIDTH);
    int any = 0;
    for (int lane = 0; lane < WIDTH; lane++) any |= unknown[lane];
    return any;
}
#else
#define look_up_all(x, t, size, count, values) look_up_plain(x, t, count, values)
#endif

// A line tells the bits of x + shift the index of a value or the one before it: the threshold between both decides.
// Tables have 32, 64 or 256 entries. Returns whether there are x below `least`, or NaN. At least 16 values.
int look_up(const float *restrict x, const float *thresholds, const float *values_of, float shift, float slope,
            float offset, float top, float least, int size, int64_t count, float *restrict values) {
    const table t = {thresholds, values_of, shift, slope, offset, top, least};
#if VECTOR == 32
    size = top < 8 ? 8 : top < 16 ? 16 : size; // no entry behind `top` is read
#endif
    switch (size) { // with constants, for each of which the loop is unrolled
#if VECTOR == 32
    case 8: return look_up_all(x, &t, 8, count, values);
    case 16: return look_up_all(x, &t, 16, count, values);
#endif
    case 32: return look_up_all(x, &t, 32, count, values);
    case 64: return look_up_all(x, &t, 64, count, values);
    default: return look_up_all(x, &t, 256, count, values);
    }
}

// gradient * (value + shift) / (x + shift) where low <= x + shift <= high and value + shift > 0; elsewhere 0.
void log_gradient(const float *restrict gradient, const float *restrict x, const float *restrict values, float shift,
                  float low, float high, int64_t count, float *restrict out) {
    for (int64_t i = 0; i < count; i++) {
        const float from = x[i] + shift, to = values[i] + shift;
        const float ratio = to / from;
        out[i] = gradient[i] * ((from >= low) & (from <= high) & (to > 0.0f) ? ratio : 0.0f);
    }
}

// Fake quantization in one pass over memory. Only +, -, *, / and rounding of IEEE floats, each for itself, so that every
// value has the bits that torch's operators give it.
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef int32_t ints __attribute__((vector_size(32)));
enum { WIDTH = sizeof(ints) / sizeof(int32_t) };

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

static inline uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

// The table's value for the upper bits of each x. Where that is NaN, its lowest bits are a row of `fine`, and the 7 bits
// of x that follow the upper ones the column; where that is NaN too, the same again for the last 7 bits. Returns
// whether there are x that have no value there either: theirs is NaN.
int look_up(const float *restrict x, const float *restrict table, const float *restrict fine, int shift, int64_t count,
            float *restrict values) {
    int open = 0;
    for (int64_t i = 0; i < count; i++) {
        const uint32_t bits = bits_of(x[i]);
        float value = table[bits >> shift];
        if (__builtin_expect(value != value, 0)) {
            value = fine[(bits_of(value) & 0x3FFFFF) * 128 + (bits >> (shift - 7) & 127)];
            if (value != value) value = fine[(bits_of(value) & 0x3FFFFF) * 128 + (bits >> (shift - 14) & 127)];
            open |= value != value;
        }
        values[i] = value;
    }
    return open;
}

static inline ints steps_of_few(const float *x, const int32_t *first, const int32_t *change, float *values) {
    ints bits, value = {0};
    memcpy(&bits, x, sizeof bits);
    for (int k = 0; k < STEPS; k++) value ^= (bits >= first[k]) & change[k];
    memcpy(values, &value, sizeof value);
    return (value & 0x7FFFFFFF) > 0x7F800000;
}

// For a function of few steps: the bits of a value are the exclusive or of each change[k] whose first[k] is at most the
// bits of x, as an integer; STEPS of them. Returns whether there are NaN among the values. At least WIDTH values.
int steps(const float *restrict x, const int32_t *restrict first, const int32_t *restrict change, int64_t count,
          float *restrict values) {
    ints nan = {0};
    for (int64_t i = 0; i + WIDTH <= count; i += WIDTH) nan |= steps_of_few(x + i, first, change, values + i);
    if (count % WIDTH) nan |= steps_of_few(x + count - WIDTH, first, change, values + count - WIDTH);
    int any = 0;
    for (int lane = 0; lane < WIDTH; lane++) any |= nan[lane];
    return any;
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

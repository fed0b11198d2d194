/* One vector of floats, whatever the instruction set. Everything but fused multiply-add and the
 * half-precision load is the compilers' vector extension, so that one text serves all of them. */
#ifndef REMOE_VECTOR_H
#define REMOE_VECTOR_H

#include <stdint.h>
#include <string.h>

#include "kernel.h"

#if defined(__AVX512F__)
#define LANES 16
#include <immintrin.h>
#elif defined(__AVX2__)
#define LANES 8
#include <immintrin.h>
#elif defined(__aarch64__) && !defined(PORTABLE)
#define LANES 4
#define NEON
#include <arm_neon.h>
#else
#define LANES 4
#endif

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t half_bits __attribute__((vector_size(2 * LANES)));

static inline vec splat(float x) {
    return x - (vec){0};
}

static inline vec fused(vec a, vec b, vec c) { /* a * b + c */
#if defined(__AVX512F__)
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(NEON)
    return (vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

static inline vec choose(bits where, vec yes, vec no) {
    return (vec)((where & (bits)yes) | (~where & (bits)no));
}

/* Numbers beyond a limit become the limit; NaN stays NaN. */
static inline vec at_most(vec limit, vec x) {
#if defined(__AVX512F__)
    return (vec)_mm512_min_ps((__m512)limit, (__m512)x);
#else
    return choose((bits)(x > limit), limit, x);
#endif
}

static inline vec at_least(vec limit, vec x) {
#if defined(__AVX512F__)
    return (vec)_mm512_max_ps((__m512)limit, (__m512)x);
#else
    return choose((bits)(x < limit), limit, x);
#endif
}

static inline vec from_half(half_bits h) {
#if defined(__AVX512F__)
    return (vec)_mm512_cvtph_ps((__m256i)h);
#elif defined(__AVX2__)
    return (vec)_mm256_cvtph_ps((__m128i)h);
#elif defined(NEON)
    return (vec)vcvt_f32_f16((float16x4_t)h);
#else
    /* Exponent and fraction moved into place and rescaled, which is exact for denormals too;
     * then infinities and NaN, whose exponent must be all ones. */
    bits wide = __builtin_convertvector(h, bits);
    bits magnitude = (wide & 0x7fff) << 13;
    vec scaled = (vec)magnitude * splat(0x1p112f);
    bits special = (bits)(magnitude >= 0x7c00 << 13);
    bits exponent = special & 0x7f800000u;
    return (vec)((wide & 0x8000) << 16 | (bits)scaled | exponent);
#endif
}

/* The nearest, ties to even; NaN stays NaN. */
static inline half_bits to_bfloat16(vec v) {
    bits b = (bits)v;
    bits rounded = (b + 0x7fff + (b >> 16 & 1)) >> 16;
    bits nan = (bits)(v != v);
    return __builtin_convertvector((nan & (b >> 16 | 0x40)) | (~nan & rounded), half_bits);
}

static inline half_bits to_half(vec v) {
#if defined(__AVX512F__)
    return (half_bits)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
    return (half_bits)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(NEON)
    return (half_bits)vcvt_f16_f32((float32x4_t)v);
#else
    /* Adding a number whose last bit is what a half keeps of this exponent rounds to that bit; the
     * result's bits are then the half's, once the exponent is rebased. */
    bits sign = (bits)v >> 16 & 0x8000, magnitude = (bits)v & 0x7fffffff;
    bits exponent = magnitude & 0x7f800000;
    bits least = (bits)(exponent < 0x38800000), base = (least & 0x38800000) | (~least & exponent);
    vec magic = (vec)(base + (13 << 23));
    bits rounded = (bits)((vec)magnitude + magic) - (bits)magic; /* in units of the last bit */
    bits finite = (((base - 0x38800000) >> 13) + rounded);
    bits big = (bits)(magnitude >= 0x477ff000); /* rounds to infinity */
    finite = (big & 0x7c00) | (~big & finite);
    bits special = (bits)(magnitude >= 0x7f800000);
    bits payload = 0x7c00 | ((bits)(magnitude > 0x7f800000) & (0x200 | (magnitude >> 13 & 0x3ff)));
    return __builtin_convertvector(sign | (special & payload) | (~special & finite), half_bits);
#endif
}

static inline vec load_float(const void *from) {
    vec v;
    memcpy(&v, from, sizeof v);
    return v;
}

static inline void store_float(void *to, vec v) {
    memcpy(to, &v, sizeof v);
}

/* Not a type of weights: floats that this code has just written, and so are in the cache. */
#define WIDENED 3

/* LANES numbers of a stored type, widened. `dtype` is a constant wherever speed matters. */
static inline vec load(const void *from, int64_t dtype) {
    if (dtype == FLOAT32 || dtype == WIDENED) return load_float(from);
    half_bits h;
    memcpy(&h, from, sizeof h);
    if (dtype == FLOAT16) return from_half(h);
    return (vec)(__builtin_convertvector(h, bits) << 16);
}

static inline size_t bytes_of(int64_t dtype) {
    return dtype == BFLOAT16 || dtype == FLOAT16 ? 2 : 4;
}

/* The first `count` < LANES numbers, then zeros; reads nothing beyond them. */
static inline vec load_partial(const void *from, int64_t dtype, size_t count) {
    unsigned char padded[4 * LANES] = {0};
    memcpy(padded, from, count * bytes_of(dtype));
    return load(padded, dtype);
}

#endif

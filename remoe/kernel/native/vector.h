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

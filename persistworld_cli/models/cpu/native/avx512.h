// A vector of 16 numbers and what the kernels do with it; AVX-512F alone is needed.
#pragma once

#include <immintrin.h>
#include <stdint.h>

typedef __m512 vec;
typedef __mmask16 lanes;  // some of a vector's numbers

enum { LANES = 16, REGISTERS = 32 };

static inline vec set(float f) { return _mm512_set1_ps(f); }
static inline vec load(const float *p) { return _mm512_loadu_ps(p); }
static inline void store(float *p, vec v) { _mm512_storeu_ps(p, v); }
static inline vec load(const bf16 *p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
static inline void store(bf16 *p, vec v) {  // to nearest, ties to even
    __m512i bits = _mm512_castps_si512(v);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtepi32_epi16(rounded));
}
static inline vec gather(const float *p, int apart) {
    const __m512i numbers = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_i32gather_ps(_mm512_mullo_epi32(numbers, _mm512_set1_epi32(apart)), p, sizeof(float));
}

static inline vec fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
static inline vec fnma(vec a, vec b, vec c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
static inline vec least(vec a, vec b) { return _mm512_min_ps(a, b); }
static inline vec most(vec a, vec b) { return _mm512_max_ps(a, b); }
static inline vec magnitude(vec v) { return _mm512_abs_ps(v); }
static inline vec nearest(vec v) { return _mm512_roundscale_ps(v, 0); }
static inline vec times_two_to(vec v, vec n) { return _mm512_scalef_ps(v, n); }  // n whole, -126 to 127
static inline float total(vec v) { return _mm512_reduce_add_ps(v); }
static inline float largest(vec v) { return _mm512_reduce_max_ps(v); }

static inline lanes positive(vec v) { return _mm512_cmp_ps_mask(v, set(0), _CMP_GT_OQ); }
static inline lanes first_of(int64_t n) { return (lanes)((1u << n) - 1); }  // n from 0 to LANES
static inline vec choose(lanes where, vec there, vec elsewhere) {
    return _mm512_mask_mov_ps(elsewhere, where, there);
}

// LANES rows of LANES to columns
static inline void transpose(vec *r) {
    vec t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        __m512d a = _mm512_castps_pd(t[i]), b = _mm512_castps_pd(t[i + 2]);
        __m512d c = _mm512_castps_pd(t[i + 1]), d = _mm512_castps_pd(t[i + 3]);
        r[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), r[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        r[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(c, d)), r[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(c, d));
    }
    for (int i = 0; i < 4; i++) {  // quarters
        t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88), t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88), r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_f32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

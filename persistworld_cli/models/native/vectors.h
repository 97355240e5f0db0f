// Vectors of 16 numbers, products of matrices and a thread's memory: what the kernels share. AVX-512F alone is needed.
#pragma once

#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef __m512 vec;
typedef int64_t ll;
enum { LANES = 16 };

// -- numbers ---------------------------------------------------------------------------------------------------------

struct bf16 {
    uint16_t bits;
};

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

static inline vec set(float f) { return _mm512_set1_ps(f); }

// exp by Cody and Waite's reduction and a polynomial of order 6 (2e-7 of the value), for x in -87 .. 88
static inline vec exponential(vec x) {
    x = _mm512_max_ps(_mm512_min_ps(x, set(88.0f)), set(-87.0f));
    const vec n = _mm512_roundscale_ps(_mm512_mul_ps(x, set(1.44269504f)), 0);
    vec r = _mm512_fnmadd_ps(n, set(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, set(-2.12194440e-4f), r);
    vec p = set(1.0f / 720);
    p = _mm512_fmadd_ps(p, r, set(1.0f / 120));
    p = _mm512_fmadd_ps(p, r, set(1.0f / 24));
    p = _mm512_fmadd_ps(p, r, set(1.0f / 6));
    p = _mm512_fmadd_ps(p, r, set(0.5f));
    p = _mm512_fmadd_ps(p, r, set(1.0f));
    p = _mm512_fmadd_ps(p, r, set(1.0f));
    return _mm512_scalef_ps(p, n);
}

static inline vec sigmoid(vec x) {
    return _mm512_div_ps(set(1.0f), _mm512_add_ps(set(1.0f), exponential(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

static inline vec silu(vec x) { return _mm512_mul_ps(x, sigmoid(x)); }

// the normal distribution below x, (1 + erf(x / sqrt 2)) / 2, by Abramowitz and Stegun 7.1.26 (1e-7); `bell` becomes
// exp(-x^2 / 2)
static inline vec below(vec x, vec *bell) {
    const vec z = _mm512_mul_ps(_mm512_abs_ps(x), set(0.70710678f));
    const vec t = _mm512_div_ps(set(1.0f), _mm512_fmadd_ps(set(0.3275911f), z, set(1.0f)));
    vec p = set(1.061405429f);
    p = _mm512_fmadd_ps(p, t, set(-1.453152027f));
    p = _mm512_fmadd_ps(p, t, set(1.421413741f));
    p = _mm512_fmadd_ps(p, t, set(-0.284496736f));
    p = _mm512_fmadd_ps(p, t, set(0.254829592f));
    *bell = exponential(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_mul_ps(z, z)));
    const vec tail = _mm512_mul_ps(_mm512_mul_ps(set(0.5f), p), _mm512_mul_ps(t, *bell));
    return _mm512_mask_sub_ps(tail, _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ), set(1.0f), tail);
}

static inline vec gelu(vec x) {
    vec bell;
    return _mm512_mul_ps(x, below(x, &bell));
}

// -- products ----------------------------------------------------------------------------------------------------------

// C (rows, NV * 16) = A (rows, k) B (k, NV * 16), or += where ADD; R rows at a time, held in registers
template <int R, int NV, bool ADD>
static inline void rows_of(const float *a, const float *b, float *c, ll k, ll a_row, ll c_row) {
    vec sum[R][NV];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < NV; v++) sum[r][v] = ADD ? load(c + r * c_row + v * LANES) : _mm512_setzero_ps();
    for (ll i = 0; i < k; i++) {
        vec right[NV];
        for (int v = 0; v < NV; v++) right[v] = load(b + i * NV * LANES + v * LANES);
        for (int r = 0; r < R; r++) {
            vec left = set(a[r * a_row + i]);
            for (int v = 0; v < NV; v++) sum[r][v] = _mm512_fmadd_ps(left, right[v], sum[r][v]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < NV; v++) store(c + r * c_row + v * LANES, sum[r][v]);
}

template <int R, int NV, bool ADD> struct Remainder {
    static void run(ll rows, const float *a, const float *b, float *c, ll k, ll a_row, ll c_row) {
        if (rows == R)
            rows_of<R, NV, ADD>(a, b, c, k, a_row, c_row);
        else
            Remainder<R - 1, NV, ADD>::run(rows, a, b, c, k, a_row, c_row);
    }
};
template <int NV, bool ADD> struct Remainder<0, NV, ADD> {
    static void run(ll, const float *, const float *, float *, ll, ll, ll) {}
};

template <int R, int NV, bool ADD>
static void block(ll rows, const float *a, const float *b, float *c, ll k, ll a_row, ll c_row) {
    while (rows) {
        ll steps = (rows + R - 1) / R, now = (rows + steps - 1) / steps;  // evenly: no short last one
        Remainder<R, NV, ADD>::run(now, a, b, c, k, a_row, c_row);
        a += now * a_row, c += now * c_row, rows -= now;
    }
}

// C (rows, n) = A (rows, k) B, or += where ADD. B lies in blocks of 64, then 32, then 16 columns, each (k, width).
template <bool ADD = false>
static void product(ll rows, const float *a, const float *b, float *c, ll k, ll n, ll a_row, ll c_row) {
    ll at = 0;
    for (; n - at >= 64; at += 64) block<6, 4, ADD>(rows, a, b + at * k, c + at, k, a_row, c_row);
    if (n - at >= 32) block<12, 2, ADD>(rows, a, b + at * k, c + at, k, a_row, c_row), at += 32;
    if (n - at >= 16) block<14, 1, ADD>(rows, a, b + at * k, c + at, k, a_row, c_row);
}

// where column `at` of n lies in such a B with k rows: first number and distance of rows
struct Column {
    ll first, row;
};
static inline Column column(ll at, ll k, ll n) {
    const ll left = n - at / 64 * 64;
    ll start = at / 64 * 64, width = 64;
    if (left < 64) {
        if (left >= 32 && at - start < 32)
            width = 32;
        else
            start += left >= 32 ? 32 : 0, width = 16;
    }
    return {start * k + at - start, width};
}

// -- scratch memory of a thread ------------------------------------------------------------------------------------------

struct Scratch {
    float *at = 0;
    size_t size = 0;
    ~Scratch() { free(at); }
};

// at least so many numbers, of any value, until the next call in this thread
static float *room(size_t numbers) {
    static thread_local Scratch own;
    if (numbers > own.size) {
        free(own.at);
        own.at = 0, own.size = 0;
        if (posix_memalign((void **)&own.at, 64, numbers * sizeof(float))) abort();
        own.size = numbers;
    }
    return own.at;
}

static inline ll ceil_div(ll a, ll b) { return (a + b - 1) / b; }

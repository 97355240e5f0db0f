// Vectors, products of matrices and a thread's memory: what the kernels share.
#pragma once

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <type_traits>

typedef int64_t ll;

struct bf16 {
    uint16_t bits;
};

#ifdef __AVX512F__
#include "avx512.h"
#else
#include "avx2.h"
#endif

enum { MULTIPLE = 16 };  // of every number of channels; `LANES` of calls.py

// -- functions -----------------------------------------------------------------------------------------------------------

// exp by Cody and Waite's reduction and a polynomial of order 6 (2e-7 of the value), for x in -87 .. 88
static inline vec exponential(vec x) {
    x = most(least(x, set(88.0f)), set(-87.0f));
    const vec n = nearest(x * set(1.44269504f));
    vec r = fnma(n, set(0.693359375f), x);
    r = fnma(n, set(-2.12194440e-4f), r);
    vec p = set(1.0f / 720);
    p = fma(p, r, set(1.0f / 120));
    p = fma(p, r, set(1.0f / 24));
    p = fma(p, r, set(1.0f / 6));
    p = fma(p, r, set(0.5f));
    p = fma(p, r, set(1.0f));
    p = fma(p, r, set(1.0f));
    return times_two_to(p, n);
}

static inline vec sigmoid(vec x) {
    return set(1.0f) / (set(1.0f) + exponential(set(0) - x));
}

static inline vec silu(vec x) { return x * sigmoid(x); }

// the normal distribution below x, (1 + erf(x / sqrt 2)) / 2, by Abramowitz and Stegun 7.1.26 (1e-7); `bell` becomes
// exp(-x^2 / 2)
static inline vec below(vec x, vec *bell) {
    const vec z = magnitude(x) * set(0.70710678f);
    const vec t = set(1.0f) / fma(set(0.3275911f), z, set(1.0f));
    vec p = set(1.061405429f);
    p = fma(p, t, set(-1.453152027f));
    p = fma(p, t, set(1.421413741f));
    p = fma(p, t, set(-0.284496736f));
    p = fma(p, t, set(0.254829592f));
    *bell = exponential(set(0) - (z * z));
    const vec tail = (set(0.5f) * p) * (t * *bell);
    return choose(positive(x), set(1.0f) - tail, tail);
}

static inline vec gelu(vec x) {
    vec bell;
    return x * below(x, &bell);
}

// -- products ----------------------------------------------------------------------------------------------------------
// Right factors lie in blocks of columns, of as many as the registers hold sums for: 64, then 32, then 16 (or 16 alone)

enum { DEEP = 256 };

// rows whose sums, NV vectors each, are held in registers, beside NV of the right factor and one of the left
template <int NV> constexpr int ROWS_AT_ONCE = REGISTERS == 16 ? 6 : NV == 4 ? 6 : NV == 2 ? 12 : 14;

// C (rows, NV * LANES) = A (rows, k) B (k, NV * LANES), or += where ADD; R rows
template <int R, int NV, bool ADD>
static inline void rows_of(const float *a, const float *b, float *c, ll k, ll a_row, ll b_row, ll c_row) {
    vec sum[R][NV];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < NV; v++) sum[r][v] = ADD ? load(c + r * c_row + v * LANES) : set(0);
    for (ll i = 0; i < k; i++) {
        vec right[NV];
        for (int v = 0; v < NV; v++) right[v] = load(b + i * b_row + v * LANES);
        for (int r = 0; r < R; r++) {
            vec left = set(a[r * a_row + i]);
            for (int v = 0; v < NV; v++) sum[r][v] = fma(left, right[v], sum[r][v]);
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < NV; v++) store(c + r * c_row + v * LANES, sum[r][v]);
}

template <int R, int NV, bool ADD> struct Remainder {
    static void run(ll rows, const float *a, const float *b, float *c, ll k, ll a_row, ll b_row, ll c_row) {
        if (rows == R)
            rows_of<R, NV, ADD>(a, b, c, k, a_row, b_row, c_row);
        else
            Remainder<R - 1, NV, ADD>::run(rows, a, b, c, k, a_row, b_row, c_row);
    }
};
template <int NV, bool ADD> struct Remainder<0, NV, ADD> {
    static void run(ll, const float *, const float *, float *, ll, ll, ll, ll) {}
};

template <int NV, bool ADD>
static void block(ll rows, const float *a, const float *b, float *c, ll k, ll a_row, ll b_row, ll c_row) {
    constexpr int R = ROWS_AT_ONCE<NV>;
    while (rows) {
        ll steps = (rows + R - 1) / R, now = (rows + steps - 1) / steps;  // evenly: no short last one
        Remainder<R, NV, ADD>::run(now, a, b, c, k, a_row, b_row, c_row);
        a += now * a_row, c += now * c_row, rows -= now;
    }
}

// width of the block that begins at column `at` of n
static inline ll block_width(ll at, ll n) {
    if (REGISTERS == 16) return 16;
    return n - at >= 64 ? 64 : n - at >= 32 ? 32 : 16;
}

// a block of `width` columns
template <bool ADD>
static inline void columns(ll width, ll rows, const float *a, const float *b, float *c, ll k, ll a_row, ll b_row,
                           ll c_row) {
    if (width == 64)
        block<4, ADD>(rows, a, b, c, k, a_row, b_row, c_row);
    else if (width == 32)
        block<32 / LANES, ADD>(rows, a, b, c, k, a_row, b_row, c_row);
    else
        block<16 / LANES, ADD>(rows, a, b, c, k, a_row, b_row, c_row);
}

// C (rows, n) = A (rows, k) B, or += where ADD; n a multiple of 16. What is deeper than DEEP goes in several passes, so
// that a pass's part of B stays in the first cache.
template <bool ADD = false>
static void product(ll rows, const float *a, const float *b, float *c, ll k, ll n, ll a_row, ll c_row) {
    for (ll at = 0, width; at < n; at += width) {
        width = block_width(at, n);
        const auto pass = [&](auto whole, ll from, ll count) {
            columns<decltype(whole)::value>(width, rows, a + from, b + at * k + from * width, c + at, count, a_row,
                                            width, c_row);
        };
        pass(std::integral_constant<bool, ADD>(), 0, k < DEEP ? k : DEEP);
        for (ll from = DEEP; from < k; from += DEEP)
            pass(std::true_type(), from, k - from < DEEP ? k - from : DEEP);
    }
}

// where column `at` of n lies in such a B with k rows: first number and distance of rows
struct Column {
    ll first, row;
};
static inline Column column(ll at, ll k, ll n) {
    ll begin = 0, width = block_width(0, n);
    while (at >= begin + width) begin += width, width = block_width(begin, n);
    return {begin * k + at - begin, width};
}

// -- scratch memory of a thread ------------------------------------------------------------------------------------------

struct Scratch {
    float *at = 0;
    size_t size = 0;
    ~Scratch() { free(at); }
};

// at least so many numbers, of any value, until the next call in this thread
static inline float *room(size_t numbers) {
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

// Sums of outer products: what the gradient of an adapter's small weights is made of. In float32.
//
//   out[tap, r, c] = sum over items and pixels p of t[item, p, r] x[item, p + tap, c]
//
// One tap is a product of matrices, t' x; 3 x 3 or 3 x 1 taps are a convolution's weight gradient. A thread takes some
// pixels at once and turns their t, so that a product reads both factors in order and holds its sums in registers.

#include "vectors.h"

enum { PIXELS = 128 };

struct Outer {
    const float *t, *x; // (N, H, W, R), (N, H, W, C)
    float *out;         // (threads, taps, R, C), zeros
    ll n, h, w, rank, width, down, across; // taps in a direction, 1 or 3
    ll threads;
};

// t of pixels first .. first + count, turned: (R, PIXELS); 0 in column `none` of the picture
static void turn(const Outer &call, const float *t, ll first, ll count, ll none, float *out) {
    for (ll p = 0; p < count; p++) {
        const bool zero = none >= 0 && (first + p) % call.w == none;
        for (ll r = 0; r < call.rank; r++) out[r * PIXELS + p] = zero ? 0 : t[p * call.rank + r];
    }
}

// out (R, C) += turned (R, PIXELS) x (count, C)
static void add(const Outer &call, const float *turned, const float *x, ll count, float *out) {
    for (ll at = 0, columns_now; at < call.width; at += columns_now) {
        columns_now = block_width(at, call.width);
        columns<true>(columns_now, call.rank, turned, x + at, out + at, count, PIXELS, call.width, call.width);
    }
}

extern "C" void pw_outer(const Outer *given) {
    const Outer &call = *given;
    const ll area = call.h * call.w, pieces = ceil_div(area, PIXELS), each = ceil_div(area, pieces);
    const ll own = call.down * call.across * call.rank * call.width;
#pragma omp parallel num_threads(call.threads)
    {
        float *turned = room(call.rank * PIXELS), *out = call.out + omp_get_thread_num() * own;
#pragma omp for schedule(static)
        for (ll number = 0; number < call.n * pieces; number++) {
            const ll item = number / pieces, first = number % pieces * each;
            const ll last = first + each < area ? first + each : area;
            const float *t = call.t + (item * area + first) * call.rank, *x = call.x + item * area * call.width;
            for (ll j = 0; j < call.across; j++) {
                // what the first column sees on its left, and the last on its right, is outside
                const ll right = call.across == 1 ? 0 : j - 1, none = right < 0 ? 0 : right > 0 ? call.w - 1 : -1;
                turn(call, t, first, last - first, none, turned);
                for (ll i = 0; i < call.down; i++) {
                    const ll below = call.down == 1 ? 0 : i - 1, ahead = below * call.w + right;
                    ll from = first, to = last;
                    if (from < -ahead) from = -ahead;
                    if (from < -below * call.w) from = -below * call.w;
                    if (to > area - ahead) to = area - ahead;
                    if (to > area - below * call.w) to = area - below * call.w;
                    if (from < to)
                        add(call, turned + (from - first), x + (from + ahead) * call.width, to - from,
                            out + (i * call.across + j) * call.rank * call.width);
                }
            }
        }
    }
}

// A linear layer: out = x W' + bias, some rows at a time. In float32.

#include "vectors.h"

enum { HELD = 1 << 14 };  // numbers of x that stay in the second cache while all columns go by

extern "C" void pw_linear(const float *x, const float *u, const float *bias, float *out, ll rows, ll width, ll wide) {
    const ll most = HELD / width < 12 ? 12 : HELD / width > 96 ? 96 : HELD / width, threads = omp_get_max_threads();
    const ll each = ceil_div(rows, ceil_div(ceil_div(rows, most), threads) * threads);
#pragma omp parallel for schedule(static)
    for (ll first = 0; first < rows; first += each) {
        const ll count = first + each < rows ? each : rows - first;
        float *own = out + first * wide;
        if (bias) {
            for (ll i = 0; i < count; i++) memcpy(own + i * wide, bias, wide * sizeof(float));
            product<true>(count, x + first * width, u, own, width, wide, width, wide);
        } else {
            product(count, x + first * width, u, own, width, wide, width, wide);
        }
    }
}

// W (wide, width) in the blocks that `product` reads
extern "C" void pw_pack_linear(const float *w, float *u, ll wide, ll width) {
#pragma omp parallel for schedule(static)
    for (ll o = 0; o < wide; o++) {
        const Column to = column(o, width, wide);
        for (ll c = 0; c < width; c++) u[to.first + c * to.row] = w[o * width + c];
    }
}

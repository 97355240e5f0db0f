// The gate of a feed-forward block, value * gelu(gate), forward and backward.        Shazeer, arXiv 2002.05202 (GEGLU)
//
// Each row of `both` has the values, then the gates; `bias` (2 hidden) is added as they are read, which spares a pass.

#include "vectors.h"

template <typename T> static void gate(const T *both, const float *bias, T *out, ll rows, ll hidden) {
#pragma omp parallel for schedule(static)
    for (ll row = 0; row < rows; row++)
        for (ll c = 0; c < hidden; c += LANES) {
            const T *own = both + row * 2 * hidden + c;
            vec value = load(own), g = load(own + hidden);
            if (bias) value = value + load(bias + c), g = g + load(bias + hidden + c);
            store(out + row * hidden + c, value * gelu(g));
        }
}

// gelu'(x) = below(x) + x exp(-x^2 / 2) / sqrt(2 pi)
template <typename T>
static void backward(const T *both, const float *bias, const T *grad, T *out, ll rows, ll hidden) {
#pragma omp parallel for schedule(static)
    for (ll row = 0; row < rows; row++)
        for (ll c = 0; c < hidden; c += LANES) {
            const T *own = both + row * 2 * hidden + c;
            vec value = load(own), g = load(own + hidden), bell;
            if (bias) value = value + load(bias + c), g = g + load(bias + hidden + c);
            const vec share = below(g, &bell), d = load(grad + row * hidden + c);
            const vec slope = fma(g * set(0.39894228f), bell, share);
            store(out + row * 2 * hidden + c, d * (g * share));
            store(out + row * 2 * hidden + hidden + c, d * (value * slope));
        }
}

// both (rows, 2 hidden) to out (rows, hidden)
extern "C" void pw_gate(const void *both, const float *bias, void *out, ll rows, ll hidden, int is_bf16) {
    if (is_bf16)
        gate((const bf16 *)both, bias, (bf16 *)out, rows, hidden);
    else
        gate((const float *)both, bias, (float *)out, rows, hidden);
}

// grad (rows, hidden) to out (rows, 2 hidden)
extern "C" void pw_gate_backward(const void *both, const float *bias, const void *grad, void *out, ll rows, ll hidden,
                                 int is_bf16) {
    if (is_bf16)
        backward((const bf16 *)both, bias, (const bf16 *)grad, (bf16 *)out, rows, hidden);
    else
        backward((const float *)both, bias, (const float *)grad, (float *)out, rows, hidden);
}

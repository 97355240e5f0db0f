// Group normalisation as one multiplication and one addition a channel, which `winograd.cpp` applies while it reads, and
// with SiLU after it, forward and backward.
//
//   scale = weight / sqrt(variance + eps),  shift = bias - mean * scale       Wu and He, arXiv 1803.08494
//
// Sums are of differences from each channel's first value, in float32 over runs of RUN rows and in double over those:
// neither a large mean nor a long item costs digits.

#include "vectors.h"

enum { RUN = 128, CHUNK = 1024 };

// sum and sum of squares of x - first, over `rows` rows, into (2, C)
template <typename T> static void sums(const T *x, const T *first, ll rows, ll channels, double *total) {
    for (ll c = 0; c < channels; c += LANES) {
        const vec zero = load(first + c);
        double *once = total + c, *twice = total + channels + c;
        for (int i = 0; i < LANES; i++) once[i] = twice[i] = 0;
        for (ll begin = 0; begin < rows; begin += RUN) {
            vec s = set(0), q = s;
            const ll end = begin + RUN < rows ? begin + RUN : rows;
            for (ll row = begin; row < end; row++) {
                vec d = load(x + row * channels + c) - zero;
                s = s + d, q = fma(d, d, q);
            }
            float run[LANES];
            store(run, s);
            for (int i = 0; i < LANES; i++) once[i] += run[i];
            store(run, q);
            for (int i = 0; i < LANES; i++) twice[i] += run[i];
        }
    }
}

template <typename T>
static void affine(const T *x, const float *weight, const float *bias, float *scale, float *shift, double *stats,
                   double *partial, ll items, ll rows, ll channels, ll groups, double eps) {
    const ll chunks = ceil_div(rows, CHUNK);
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (ll k = 0; k < items * chunks; k++) {
            const T *item = x + k / chunks * rows * channels;
            const ll begin = k % chunks * CHUNK, left = rows - begin;
            sums(item + begin * channels, item, left < CHUNK ? left : CHUNK, channels, partial + k * 2 * channels);
        }
#pragma omp for schedule(static)
        for (ll item = 0; item < items; item++) {
            double *total = partial + item * chunks * 2 * channels;
            for (ll k = 1; k < chunks; k++)
                for (ll c = 0; c < 2 * channels; c++) total[c] += total[k * 2 * channels + c];
            const ll width = channels / groups;
            float first[LANES];
            for (ll c = 0; c < channels; c++) {  // to each channel's mean, and its sum of squares around that
                if (c % LANES == 0) store(first, load(x + item * rows * channels + c));
                const double mean = total[c] / rows;
                total[channels + c] -= total[c] * mean;
                total[c] = mean + first[c % LANES];
            }
            for (ll g = 0; g < groups; g++) {
                double mean = 0, squares = 0;
                for (ll c = g * width; c < (g + 1) * width; c++) mean += total[c] / width;
                for (ll c = g * width; c < (g + 1) * width; c++)
                    squares += total[channels + c] + rows * (total[c] - mean) * (total[c] - mean);
                const double spread = 1 / sqrt((squares > 0 ? squares : 0) / (rows * width) + eps);
                stats[(item * groups + g) * 2] = mean, stats[(item * groups + g) * 2 + 1] = spread;
                for (ll c = g * width; c < (g + 1) * width; c++) {
                    const double own = spread * weight[c];
                    scale[item * channels + c] = own;
                    shift[item * channels + c] = bias[c] - mean * own;
                }
            }
        }
    }
}

// -- with SiLU ---------------------------------------------------------------------------------------------------------

template <typename T>
static void activate(const T *x, const float *scale, const float *shift, T *out, ll items, ll rows, ll channels) {
    const ll chunks = ceil_div(rows, RUN);
#pragma omp parallel for schedule(static)
    for (ll k = 0; k < items * chunks; k++) {
        const ll item = k / chunks, begin = k % chunks * RUN, end = begin + RUN < rows ? begin + RUN : rows;
        for (ll row = begin; row < end; row++)
            for (ll c = 0; c < channels; c += LANES) {
                const ll at = (item * rows + row) * channels + c;
                const vec a = load(scale + item * channels + c), b = load(shift + item * channels + c);
                store(out + at, silu(fma(load(x + at), a, b)));
            }
    }
}

// To x: with z = x scale + shift, d = scale silu'(z) grad and a group's mean and spread (stats),
//   d - (the group's mean of d) - (x - mean) spread^2 (the group's mean of d (x - mean))
template <typename T>
static void backward(const T *x, const T *grad, const float *scale, const float *shift, const double *stats,
                     double *sums, T *out, ll items, ll rows, ll channels, ll groups) {
    const ll chunks = ceil_div(rows, RUN), width = channels / groups;
#pragma omp parallel
    {
#pragma omp for schedule(static)
        for (ll k = 0; k < items * chunks; k++) {
            const ll item = k / chunks, begin = k % chunks * RUN, end = begin + RUN < rows ? begin + RUN : rows;
            double *once = sums + k * 2 * channels, *twice = once + channels;
            for (ll c = 0; c < channels; c += LANES) {
                const vec a = load(scale + item * channels + c), b = load(shift + item * channels + c);
                float means[LANES];
                for (ll i = 0; i < LANES; i++) means[i] = stats[(item * groups + (c + i) / width) * 2];
                const vec mean = load(means);
                vec s = set(0), q = s;
                for (ll row = begin; row < end; row++) {
                    const ll at = (item * rows + row) * channels + c;
                    const vec own = load(x + at), z = fma(own, a, b), g = sigmoid(z);
                    // silu' = g (1 + z (1 - g))
                    const vec slope = g * fma(z, set(1.0f) - g, set(1.0f));
                    const vec d = (slope * a) * load(grad + at);
                    s = s + d, q = fma(d, own - mean, q);
                    store(out + at, d);
                }
                float run[LANES];
                store(run, s);
                for (int i = 0; i < LANES; i++) once[c + i] = run[i];
                store(run, q);
                for (int i = 0; i < LANES; i++) twice[c + i] = run[i];
            }
        }
#pragma omp for schedule(static)
        for (ll item = 0; item < items; item++)
            for (ll g = 0; g < groups; g++) {
                double *first = sums + item * chunks * 2 * channels, s = 0, q = 0;
                for (ll k = 0; k < chunks; k++)
                    for (ll c = g * width; c < (g + 1) * width; c++)
                        s += first[k * 2 * channels + c], q += first[(k * 2 + 1) * channels + c];
                const double spread = stats[(item * groups + g) * 2 + 1], count = (double)rows * width;
                first[g] = s / count, first[channels + g] = q / count * spread * spread;
            }
#pragma omp for schedule(static)
        for (ll k = 0; k < items * chunks; k++) {
            const ll item = k / chunks, begin = k % chunks * RUN, end = begin + RUN < rows ? begin + RUN : rows;
            const double *first = sums + item * chunks * 2 * channels;
            for (ll c = 0; c < channels; c += LANES) {
                float less[LANES], slope[LANES], means[LANES];
                for (ll i = 0; i < LANES; i++) {
                    const ll g = (c + i) / width;
                    less[i] = first[g], slope[i] = first[channels + g], means[i] = stats[(item * groups + g) * 2];
                }
                for (ll row = begin; row < end; row++) {
                    const ll at = (item * rows + row) * channels + c;
                    const vec away = load(x + at) - load(means);
                    store(out + at, fnma(away, load(slope), load(out + at) - load(less)));
                }
            }
        }
    }
}

// -- what Python calls; x, grad, out (items, rows, C), scale, shift (items, C), stats (items, groups, 2) -------------------

extern "C" ll pw_norm_chunks(ll rows) { return ceil_div(rows, CHUNK); }
extern "C" ll pw_norm_runs(ll rows) { return ceil_div(rows, RUN); }

// partial (items, chunks, 2, C)
extern "C" void pw_norm(const void *x, const float *weight, const float *bias, float *scale, float *shift,
                        double *stats, double *partial, ll items, ll rows, ll channels, ll groups, double eps,
                        int is_bf16) {
    if (is_bf16)
        affine((const bf16 *)x, weight, bias, scale, shift, stats, partial, items, rows, channels, groups, eps);
    else
        affine((const float *)x, weight, bias, scale, shift, stats, partial, items, rows, channels, groups, eps);
}

extern "C" void pw_activate(const void *x, const float *scale, const float *shift, void *out, ll items, ll rows,
                            ll channels, int is_bf16) {
    if (is_bf16)
        activate((const bf16 *)x, scale, shift, (bf16 *)out, items, rows, channels);
    else
        activate((const float *)x, scale, shift, (float *)out, items, rows, channels);
}

// sums (items, runs, 2, C)
extern "C" void pw_activate_backward(const void *x, const void *grad, const float *scale, const float *shift,
                                     const double *stats, double *sums, void *out, ll items, ll rows, ll channels,
                                     ll groups, int is_bf16) {
    if (is_bf16)
        backward((const bf16 *)x, (const bf16 *)grad, scale, shift, stats, sums, (bf16 *)out, items, rows, channels,
                 groups);
    else
        backward((const float *)x, (const float *)grad, scale, shift, stats, sums, (float *)out, items, rows, channels,
                 groups);
}

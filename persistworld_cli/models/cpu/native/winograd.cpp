// 3 x 3 and 3 x 1 convolutions by Winograd's minimal filtering, with what stands around them in a ResNet block.
//
//   out = residual + gain (conv(silu(x scale + shift)) + bias + added)
//
// Winograd, Arithmetic Complexity of Computations, 1980; for convolutions Lavin and Gray, arXiv 1509.09308. F(M, 3)
// computes M outputs from M + 2 products in each direction: 2.25 (M = 4: 4) times fewer than a direct convolution.
//
// A thread takes tiles for some 40 at once and keeps them in its own cache: it reads the input once, normalised and
// activated on the way, transforms it (V), multiplies by the transformed weights (U) point by point, and transforms
// the products (W) back. Nothing in between goes through memory. Channels are last; all sums are in float32. What a
// picture gives does not depend on its neighbours in the batch or on the number of threads.

#include "vectors.h"

enum { TARGET = 44, PAD = 16 };

// -- transforms in one direction ---------------------------------------------------------------------------------------
// Points 0, a, -a, b, -b, infinity for M = 4 (a, b = 3/4, 3/2: a third of the rounding error of 1, 2) and 0, a, -a, b,
// infinity for M = 3 (a, b = 1, 2). `weights` has the divisors, so that the other two stay short.

// g0 + g1 p + g2 p^2
static inline vec at(const vec *g, vec p) { return fma(p, fma(p, g[2], g[1]), g[0]); }

template <int M> struct Filter;

template <> struct Filter<4> {
    static constexpr float a = 0.75f, b = 1.5f, A = a * a, B = b * b;

    static inline void input(const vec *d, vec *v) {
        vec even = fnma(set(B), d[2], d[4]), odd = fnma(set(B), d[1], d[3]);
        vec even2 = fnma(set(A), d[2], d[4]), odd2 = fnma(set(A), d[1], d[3]);
        v[0] = fma(set(A * B), d[0], fnma(set(A + B), d[2], d[4]));
        v[1] = fma(set(a), odd, even);
        v[2] = fnma(set(a), odd, even);
        v[3] = fma(set(b), odd2, even2);
        v[4] = fnma(set(b), odd2, even2);
        v[5] = fma(set(A * B), d[1], fnma(set(A + B), d[3], d[5]));
    }

    static inline void output(const vec *m, vec *y) {
        vec even = m[1] + m[2], odd = m[1] - m[2];
        vec even2 = m[3] + m[4], odd2 = m[3] - m[4];
        y[0] = m[0] + (even + even2);
        y[1] = fma(set(a), odd, set(b) * odd2);
        y[2] = fma(set(A), even, set(B) * even2);
        y[3] = fma(set(A * a), odd, fma(set(B * b), odd2, m[5]));
    }

    static inline void weights(const vec *g, vec *u) {
        const float p[5] = {0, a, -a, b, -b};
        const float n[5] = {A * B, 2 * A * (A - B), 2 * A * (A - B), 2 * B * (B - A), 2 * B * (B - A)};
        for (int i = 0; i < 5; i++) u[i] = at(g, set(p[i])) / set(n[i]);
        u[5] = g[2];
    }
};

template <> struct Filter<3> {
    static constexpr float a = 1.0f, b = 2.0f, A = a * a, B = b * b;

    static inline void input(const vec *d, vec *v) {
        v[0] = fma(set(A * b), d[0], fnma(set(A), d[1], fnma(set(b), d[2], d[3])));
        v[1] = fma(set(-a * b), d[1], fma(set(a - b), d[2], d[3]));
        v[2] = fma(set(a * b), d[1], fma(set(-a - b), d[2], d[3]));
        v[3] = fnma(set(A), d[1], d[3]);
        v[4] = fma(set(A * b), d[1], fnma(set(A), d[2], fnma(set(b), d[3], d[4])));
    }

    static inline void output(const vec *m, vec *y) {
        vec even = m[1] + m[2], odd = m[1] - m[2];
        y[0] = m[0] + (even + m[3]);
        y[1] = fma(set(a), odd, set(b) * m[3]);
        y[2] = fma(set(A), even, fma(set(B), m[3], m[4]));
    }

    static inline void weights(const vec *g, vec *u) {
        const float p[4] = {0, a, -a, b};
        const float n[4] = {A * b, 2 * A * (a - b), -2 * A * (a + b), b * (B - A)};
        for (int i = 0; i < 4; i++) u[i] = at(g, set(p[i])) / set(n[i]);
        u[4] = g[2];
    }
};

// -- a call -----------------------------------------------------------------------------------------------------------

struct Call {
    const void *x;              // (N, H, W, Cin), or (N, T, S, Cin)
    const float *scale, *shift; // (N, Cin), both or neither
    const float *u, *bias;      // packed weights; (Cout)
    const float *added, *gain;  // (R, Cout), (R): R pictures, N or N * T
    const void *residual;       // as out
    void *out;                  // (N, H, W, Cout), or (N, T, S, Cout)
    ll n, h, w, cin, cout, activate;
    ll halved; // 1: x is (N, H / 2, W / 2, Cin), each of its pixels seen as four
};

// as many strips a unit as give some TARGET tiles, and every thread its share
static ll strips_a_unit(ll strips, ll tiles, int threads) {
    ll units = ceil_div(strips * tiles, TARGET);
    units = ceil_div(units, threads) * threads;
    ll per = ceil_div(strips, units);
    return per < 1 ? 1 : per;
}

template <typename T> static inline vec activated(const Call &call, const T *p, ll item, ll c) {
    vec x = load(p);
    if (call.scale)
        x = fma(x, load(call.scale + item * call.cin + c), load(call.shift + item * call.cin + c));
    return call.activate ? silu(x) : x;
}

// from the convolution's sum to the result, for picture `row`
template <typename T> static inline void finish(const Call &call, vec y, ll row, ll place, ll c) {
    if (call.bias) y = y + load(call.bias + c);
    if (call.added) y = y + load(call.added + row * call.cout + c);
    if (call.gain) y = set(call.gain[row]) * y;
    if (call.residual) y = y + load((const T *)call.residual + place * call.cout + c);
    store((T *)call.out + place * call.cout + c, y);
}

// -- 3 x 3 ---------------------------------------------------------------------------------------------------------------

// One row of tiles: activated, transformed down each column into `strip` (M + 2, columns, Cin), then along, into V.
template <typename T, int M>
static void strip_in(const Call &call, ll item, ll top, ll tiles, float *strip, float *v, ll v_point) {
    const ll P = M + 2, columns = tiles * M + 2, cin = call.cin;
    const ll half = call.halved, row_size = (call.w >> half) * cin;
    const T *x = (const T *)call.x + item * (call.h >> half) * row_size;
    for (int i = 0; i < P; i++) {
        memset(strip + i * columns * cin, 0, cin * sizeof(float));
        memset(strip + (i * columns + call.w + 1) * cin, 0, (columns - call.w - 1) * cin * sizeof(float));
    }
    for (ll column = 0; column < call.w; column++)
        for (ll c = 0; c < cin; c += LANES) {
            vec d[P], t[P];
            for (int i = 0; i < P; i++) {
                ll row = top - 1 + i;
                bool inside = row >= 0 && row < call.h;
                const T *pixel = x + (row >> half) * row_size + (column >> half) * cin + c;
                d[i] = inside ? activated(call, pixel, item, c) : set(0);
            }
            Filter<M>::input(d, t);
            for (int i = 0; i < P; i++) store(strip + (i * columns + column + 1) * cin + c, t[i]);
        }
    for (ll tile = 0; tile < tiles; tile++)
        for (int i = 0; i < P; i++)
            for (ll c = 0; c < cin; c += LANES) {
                vec d[P], t[P];
                for (int j = 0; j < P; j++) d[j] = load(strip + (i * columns + tile * M + j) * cin + c);
                Filter<M>::input(d, t);
                for (int j = 0; j < P; j++) store(v + (i * P + j) * v_point + tile * cin + c, t[j]);
            }
}

template <typename T, int M>
static void strip_out(const Call &call, ll item, ll top, ll tiles, const float *w, ll w_point) {
    const ll P = M + 2;
    for (ll tile = 0; tile < tiles; tile++)
        for (ll c = 0; c < call.cout; c += LANES) {
            vec down[M][P];
            for (int j = 0; j < P; j++) {
                vec m[P], y[M];
                for (int i = 0; i < P; i++) m[i] = load(w + (i * P + j) * w_point + tile * call.cout + c);
                Filter<M>::output(m, y);
                for (int i = 0; i < M; i++) down[i][j] = y[i];
            }
            for (int i = 0; i < M && top + i < call.h; i++) {
                vec y[M];
                Filter<M>::output(down[i], y);
                for (int j = 0; j < M && tile * M + j < call.w; j++)
                    finish<T>(call, y[j], item, (item * call.h + top + i) * call.w + tile * M + j, c);
            }
        }
}

template <typename T, int M> static void spatial(const Call &given) {
    const Call call = given;
    const ll P = M + 2, across = ceil_div(call.w, M), down = ceil_div(call.h, M), strips = call.n * down;
    const ll unit = strips_a_unit(strips, across, omp_get_max_threads());
    const ll most = unit * across, v_point = most * call.cin + PAD, w_point = most * call.cout + PAD;
    const ll strip_size = P * (across * M + 2) * call.cin;
#pragma omp parallel firstprivate(call) // nothing written can be a thread's own copy: its fields stay in registers
    {
        float *strip = room(strip_size + P * P * (v_point + w_point));
        float *v = strip + strip_size, *w = v + P * P * v_point;
#pragma omp for schedule(static)
        for (ll first = 0; first < strips; first += unit) {
            ll count = first + unit < strips ? unit : strips - first;
            for (ll s = 0; s < count; s++)
                strip_in<T, M>(call, (first + s) / down, (first + s) % down * M, across, strip,
                               v + s * across * call.cin, v_point);
            for (ll p = 0; p < P * P; p++)
                product(count * across, v + p * v_point, call.u + p * call.cin * call.cout, w + p * w_point, call.cin,
                        call.cout, call.cin, call.cout);
            for (ll s = 0; s < count; s++)
                strip_out<T, M>(call, (first + s) / down, (first + s) % down * M, across, w + s * across * call.cout,
                                w_point);
        }
    }
}

// -- 3 x 1, over frames ----------------------------------------------------------------------------------------------------

template <typename T, int M> static void temporal(const Call &given) {
    const Call call = given;
    const ll P = M + 2, frames = call.h, pixels = call.w, tiles = ceil_div(frames, M), cin = call.cin, cout = call.cout;
    const ll unit = strips_a_unit(call.n * pixels, tiles, omp_get_max_threads());
    const ll a_item = ceil_div(pixels, unit), most = unit * tiles;
    const ll v_point = most * cin + PAD, w_point = most * cout + PAD, rows = tiles * M + 2;
#pragma omp parallel firstprivate(call)
    {
        float *lines = room(rows * cin + P * (v_point + w_point));
        float *v = lines + rows * cin, *w = v + P * v_point;
#pragma omp for schedule(static)
        for (ll number = 0; number < call.n * a_item; number++) {
            const ll item = number / a_item, first = number % a_item * unit;
            const ll count = first + unit < pixels ? unit : pixels - first;
            memset(lines, 0, cin * sizeof(float));
            memset(lines + (frames + 1) * cin, 0, (rows - frames - 1) * cin * sizeof(float));
            for (ll s = 0; s < count; s++) {
                const T *x = (const T *)call.x + (item * frames * pixels + first + s) * cin;
                for (ll t = 0; t < frames; t++)
                    for (ll c = 0; c < cin; c += LANES)
                        store(lines + (t + 1) * cin + c, activated(call, x + t * pixels * cin + c, item, c));
                for (ll tile = 0; tile < tiles; tile++)
                    for (ll c = 0; c < cin; c += LANES) {
                        vec d[P], t[P];
                        for (int i = 0; i < P; i++) d[i] = load(lines + (tile * M + i) * cin + c);
                        Filter<M>::input(d, t);
                        for (int i = 0; i < P; i++) store(v + i * v_point + (s * tiles + tile) * cin + c, t[i]);
                    }
            }
            for (ll p = 0; p < P; p++)
                product(count * tiles, v + p * v_point, call.u + p * cin * cout, w + p * w_point, cin, cout, cin, cout);
            for (ll s = 0; s < count; s++)
                for (ll tile = 0; tile < tiles; tile++)
                    for (ll c = 0; c < cout; c += LANES) {
                        vec m[P], y[M];
                        for (int i = 0; i < P; i++) m[i] = load(w + i * w_point + (s * tiles + tile) * cout + c);
                        Filter<M>::output(m, y);
                        for (int i = 0; i < M && tile * M + i < frames; i++) {
                            ll row = item * frames + tile * M + i;
                            finish<T>(call, y[i], row, row * pixels + first + s, c);
                        }
                    }
        }
    }
}

// -- what Python calls -----------------------------------------------------------------------------------------------------

template <typename T> static void run(const Call &call, int tile, int is_temporal) {
    if (is_temporal)
        tile == 4 ? temporal<T, 4>(call) : temporal<T, 3>(call);
    else
        tile == 4 ? spatial<T, 4>(call) : spatial<T, 3>(call);
}

extern "C" void pw_convolve(const Call *call, int tile, int is_temporal, int is_bf16) {
    is_bf16 ? run<bf16>(*call, tile, is_temporal) : run<float>(*call, tile, is_temporal);
}

// Weights (Cout, Cin, 3, taps) to U: points x Cin x Cout, in the blocks that `product` reads; LANES outputs at a time.
template <int M> static void pack(const float *g, float *u, ll cout, ll cin, int taps) {
    const int P = M + 2, across = taps == 3 ? P : 1;
#pragma omp parallel for schedule(static)
    for (ll k = 0; k < cout / LANES * cin; k++) {
        const ll o = k / cin * LANES, c = k % cin;
        const Column to = column(o, cin, cout);
        vec own[9], down[P][3], column[3], u1[P];
        for (int i = 0; i < 3 * taps; i++)
            own[i] = gather(g + (o * cin + c) * 3 * taps + i, (int)cin * 3 * taps);
        for (int j = 0; j < taps; j++) {
            for (int i = 0; i < 3; i++) column[i] = own[i * taps + j];
            Filter<M>::weights(column, u1);
            for (int i = 0; i < P; i++) down[i][j] = u1[i];
        }
        for (int i = 0; i < P; i++) {
            if (taps == 3)
                Filter<M>::weights(down[i], u1);
            else
                u1[0] = down[i][0];
            for (int j = 0; j < across; j++)
                store(u + (i * across + j) * cin * cout + to.first + c * to.row, u1[j]);
        }
    }
}

extern "C" void pw_pack(const float *g, float *u, ll cout, ll cin, int taps, int tile) {
    tile == 4 ? pack<4>(g, u, cout, cin, taps) : pack<3>(g, u, cout, cin, taps);
}

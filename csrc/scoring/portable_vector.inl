// A vector of N floats in plain C++, for the scalar path, and for tests in place of wider vectors.
template <std::size_t N>
struct PortableVector {
    using Self = PortableVector;
    static constexpr std::size_t kLanes = N;
    static constexpr std::size_t kBlockRows = 2;
    float lane[N];

    template <typename F>
    static Self each(F f) {
        Self out;
        for (std::size_t i = 0; i < N; ++i) {
            out.lane[i] = f(i);
        }
        return out;
    }
    static Self zero() { return broadcast(0.0F); }
    static Self broadcast(float x) {
        return each([&](std::size_t) { return x; });
    }
    template <typename T>
    static Self load(const T* p) {
        return each([&](std::size_t i) { return to_float(p[i]); });
    }
    void store(float* p) const { std::memcpy(p, lane, sizeof(lane)); }
    static Self fma(Self a, Self b, Self c) {
        return each([&](std::size_t i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
    }
    static Self max(Self a, Self b) {
        return each([&](std::size_t i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
    }
    friend Self operator+(Self a, Self b) {
        return each([&](std::size_t i) { return a.lane[i] + b.lane[i]; });
    }
    friend Self operator-(Self a, Self b) {
        return each([&](std::size_t i) { return a.lane[i] - b.lane[i]; });
    }
    friend Self operator*(Self a, Self b) {
        return each([&](std::size_t i) { return a.lane[i] * b.lane[i]; });
    }
    float sum() const {
        float total = 0.0F;
        for (std::size_t i = 0; i < N; ++i) {
            total += lane[i];
        }
        return total;
    }
    static Self scale_by_power(Self value, Self biased) {
        return each([&](std::size_t i) { return as_float(as_bits(value.lane[i]) + (as_bits(biased.lane[i]) << 23)); });
    }
};

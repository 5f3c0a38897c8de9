// A key's channels one by one. For an unnamed namespace; see microkernels.inl.

// 16-bit channels as distinct types.
struct Half {
    std::uint16_t bits;
};
struct Bfloat {
    std::uint16_t bits;
};

inline float as_float(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

inline std::uint32_t as_bits(float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
}

inline float to_float(float value) { return value; }
inline float to_float(std::int8_t value) { return value; }
inline float to_float(Bfloat value) { return as_float(static_cast<std::uint32_t>(value.bits) << 16); }
inline float to_float(Half value) {
    const std::uint32_t sign = static_cast<std::uint32_t>(value.bits & 0x8000U) << 16;
    const std::uint32_t magnitude = static_cast<std::uint32_t>(value.bits & 0x7fffU) << 13;
    // Exponents differ by 112. The product corrects that for normal and subnormal numbers alike. Infinity and NaN,
    // which no plan contains, become finite.
    return as_float(as_bits(as_float(magnitude) * as_float(0x77800000U)) | sign);
}

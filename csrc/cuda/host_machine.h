// The machine of multiply.h on a CPU, for tests: every phase runs thread by thread; mma and cp.async are emulated from
// the PTX ISA's description, independently of tile.h. Errors that may go unnoticed on a GPU are caught:
//   - an asynchronous copy fills its target with NaNs until it is waited for, and completes as late as allowed;
//   - shared memory written by one thread and touched by another without a barrier between is reported as a race;
//   - an access that is out of bounds or not aligned is reported.
#pragma once

#include <cstdint>
#include <cstring>
#include <deque>
#include <stdexcept>
#include <string>
#include <vector>

#include "block.h"

namespace iosr::cuda {

inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float from_bf16(uint16_t bits) { return float_of(static_cast<uint32_t>(bits) << 16); }
inline uint16_t to_bf16(float value) {
    const uint32_t bits = bits_of(value);
    return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}
inline float from_fp16(uint16_t bits) {
    const int exponent = bits >> 10 & 31;
    const int fraction = bits & 1023;
    const float magnitude = exponent == 31  ? (fraction == 0 ? INFINITY : NAN)
                            : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                            : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
    return (bits & 0x8000) != 0 ? -magnitude : magnitude;
}
// For finite values within fp16's range; rounds to nearest even.
inline uint16_t to_fp16(float value) {
    const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
    const float magnitude = std::fabs(value);
    int exponent = 0;
    std::frexp(magnitude, &exponent);
    exponent = magnitude == 0.0F || exponent < -13 ? -13 : exponent;  // subnormals share the least exponent
    const int fraction = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 11 - exponent)));
    // A fraction below 1024 is a subnormal's; one of 2048 carries into the exponent by itself.
    return static_cast<uint16_t>(sign + (fraction < 1024 ? fraction : ((exponent + 13) << 10) + fraction));
}

template <class R>
class HostMachine {
public:
    HostMachine(int threads, int shared_bytes)
        : registers_(threads), shared_(shared_bytes, static_cast<char>(0xFF)), traces_((shared_bytes + 3) / 4) {}

    template <class F>
    void each_thread(F&& f) {
        for (int thread = 0; thread < static_cast<int>(registers_.size()); ++thread) {
            f(thread, registers_[thread]);
        }
    }

    void copy(int thread, int target, const void* source, bool inside) {
        expect(target, kCopy, kCopy);
        if (inside && reinterpret_cast<uintptr_t>(source) % kCopy != 0) {
            throw std::runtime_error("asynchronous copy from an address that isn't a multiple of 16");
        }
        write(thread, target, kCopy);
        std::memset(shared_.data() + target, 0xFF, kCopy);
        open_.push_back({thread, target, source, inside});
    }
    void commit() {
        groups_.push_back(std::move(open_));
        open_.clear();
    }
    template <int Pending>
    void wait() {
        while (static_cast<int>(groups_.size()) > Pending) {
            for (const Pending_& copy : groups_.front()) {
                write(copy.thread, copy.target, kCopy);
                if (copy.inside) {
                    std::memcpy(shared_.data() + copy.target, copy.source, kCopy);
                } else {
                    std::memset(shared_.data() + copy.target, 0, kCopy);
                }
            }
            groups_.pop_front();
        }
    }

    void barrier() {
        ++block_epoch_;
        ++warp_epoch_;
    }
    void warp_barrier() { ++warp_epoch_; }

    template <class V>
    V load(int thread, int offset) {
        expect(offset, sizeof(V), alignof(V));
        read(thread, offset, sizeof(V));
        V value;
        std::memcpy(&value, shared_.data() + offset, sizeof(V));
        return value;
    }
    template <class V>
    void store(int thread, int offset, const V& value) {
        expect(offset, sizeof(V), alignof(V));
        write(thread, offset, sizeof(V));
        std::memcpy(shared_.data() + offset, &value, sizeof(V));
    }

    template <Keys K, class F>
    void mma(F&& f) {
        const auto value = [](uint32_t word, int half) {
            const auto bits = static_cast<uint16_t>(word >> 16 * half);
            return K == Keys::kBf16 ? from_bf16(bits) : from_fp16(bits);
        };
        for (std::size_t warp = 0; warp < registers_.size(); warp += kWarp) {
            float a[16][16];
            float b[16][8];
            float* d[16][8];
            for (int lane = 0; lane < kWarp; ++lane) {
                const MmaRegisters r = f(registers_[warp + lane]);
                for (int i = 0; i < 8; ++i) {
                    const int row = i < 2 || (i >= 4 && i < 6) ? lane / 4 : lane / 4 + 8;
                    const int column = lane % 4 * 2 + (i & 1) + (i >= 4 ? 8 : 0);
                    a[row][column] = value(r.a[i / 2], i % 2);
                }
                for (int i = 0; i < 4; ++i) {
                    b[lane % 4 * 2 + (i & 1) + (i >= 2 ? 8 : 0)][lane / 4] = value(r.b[i / 2], i % 2);
                }
                for (int i = 0; i < 4; ++i) {
                    d[lane / 4 + (i >= 2 ? 8 : 0)][lane % 4 * 2 + (i & 1)] = r.accumulator + i;
                }
            }
            for (int row = 0; row < 16; ++row) {
                for (int column = 0; column < 8; ++column) {
                    float sum = *d[row][column];
                    for (int k = 0; k < 16; ++k) {
                        sum += a[row][k] * b[k][column];
                    }
                    *d[row][column] = sum;
                }
            }
        }
    }

    uint32_t subtract_halves(uint32_t x, uint32_t y) {
        uint32_t out = 0;
        for (int half = 0; half < 2; ++half) {
            const float difference = from_fp16(static_cast<uint16_t>(x >> 16 * half)) -
                                     from_fp16(static_cast<uint16_t>(y >> 16 * half));
            out |= static_cast<uint32_t>(to_fp16(difference)) << 16 * half;
        }
        return out;
    }

private:
    struct Pending_ {
        int thread;
        int target;
        const void* source;
        bool inside;
    };
    // The last write of a word, the last read, and the warps that have read it since the last block barrier.
    struct Trace {
        int writer = -1;
        int64_t write_block = -1;
        int64_t write_warp = -1;
        int reader = -1;
        int64_t read_block = -1;
        int64_t read_warp = -1;
        uint32_t warps = 0;
    };

    void expect(int offset, std::size_t bytes, std::size_t alignment) const {
        if (offset < 0 || offset + bytes > shared_.size() || offset % alignment != 0) {
            throw std::runtime_error("shared memory access out of bounds or not aligned at byte " +
                                     std::to_string(offset));
        }
    }
    [[noreturn]] static void race(const char* kind, int thread, int other, int offset) {
        throw std::runtime_error(std::string("race: ") + kind + " by thread " + std::to_string(thread) +
                                 " without a barrier after thread " + std::to_string(other) + ", byte " +
                                 std::to_string(offset));
    }
    bool unordered(int thread, int other, int64_t block, int64_t warp) const {
        return other >= 0 && other != thread &&
               (thread / kWarp == other / kWarp ? warp == warp_epoch_ : block == block_epoch_);
    }
    void read(int thread, int offset, std::size_t bytes) {
        for (std::size_t word = offset / 4; word * 4 < offset + bytes; ++word) {
            Trace& trace = traces_[word];
            if (unordered(thread, trace.writer, trace.write_block, trace.write_warp)) {
                race("read", thread, trace.writer, offset);
            }
            trace.warps = (trace.read_block == block_epoch_ ? trace.warps : 0) | 1U << thread / kWarp;
            trace.reader = thread;
            trace.read_block = block_epoch_;
            trace.read_warp = warp_epoch_;
        }
    }
    void write(int thread, int offset, std::size_t bytes) {
        for (std::size_t word = offset / 4; word * 4 < offset + bytes; ++word) {
            Trace& trace = traces_[word];
            const bool other_warps = trace.read_block == block_epoch_ && (trace.warps & ~(1U << thread / kWarp)) != 0;
            if (unordered(thread, trace.writer, trace.write_block, trace.write_warp)) {
                race("write", thread, trace.writer, offset);
            }
            if (other_warps || unordered(thread, trace.reader, trace.read_block, trace.read_warp)) {
                race("write", thread, trace.reader, offset);
            }
            trace.writer = thread;
            trace.write_block = block_epoch_;
            trace.write_warp = warp_epoch_;
        }
    }

    std::vector<R> registers_;
    std::vector<char> shared_;
    std::vector<Trace> traces_;
    std::vector<Pending_> open_;
    std::deque<std::vector<Pending_>> groups_;
    int64_t block_epoch_ = 0;
    int64_t warp_epoch_ = 0;
};

}  // namespace iosr::cuda

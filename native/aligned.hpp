// Memory for numbers that vectors read. It owns where that memory begins.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

namespace halfbyte {

// Memory on a cache line's edge: a vector that lies across two lines costs two loads.
template <class T>
class Aligned {
  public:
    Aligned() = default;
    explicit Aligned(std::int64_t count, bool zeroed = true)  // else all must be written before it is read
        : data_(static_cast<T*>(::operator new(bytes(count), std::align_val_t{kLine}))) {
        if (zeroed) std::memset(data_.get(), 0, bytes(count));
    }
    T* data() const { return data_.get(); }

  private:
    static constexpr std::size_t kLine = 64;
    static std::size_t bytes(std::int64_t count) { return static_cast<std::size_t>(count) * sizeof(T); }
    struct Free {
        void operator()(T* data) const { ::operator delete(data, std::align_val_t{kLine}); }
    };
    std::unique_ptr<T, Free> data_;
};

}  // namespace halfbyte

// What the products share: which micro-kernel multiplies, and memory.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <optional>

#include "amx.h"
#include "pack.h"
#include "parallel.h"
#include "tiles.h"

namespace {

constexpr int64_t CACHE = 1 << 18;  // bytes of a packed block that shall stay in the second-level cache
constexpr int64_t PANEL_STEP = TILE_COLUMNS * 4;

// Whether products go through amx.h.
bool blocks_on = false;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }
int64_t tile_rows(bool blocks) { return blocks ? MOST_ROWS : TILE_ROWS; }

void multiply(const Tile& tile, const Terms& terms, bool blocks) {
    if (blocks) {
        multiply_blocks(tile, terms);
    } else {
        multiply(tile, terms);
    }
}

// Memory that is kept for the next product: fresh pages cost more than filling them.
class Buffer {
  public:
    char* reserve(int64_t bytes) {
        if (bytes > size_) {
            std::free(data_);
            size_ = divide_up(bytes + bytes / 4, 4096) * 4096;
            data_ = (char*)std::aligned_alloc(4096, size_);
        }
        return data_;
    }
    ~Buffer() { std::free(data_); }

  private:
    char* data_ = nullptr;
    int64_t size_ = 0;
};

thread_local Buffer own_buffer, first_buffer, second_buffer;

}  // namespace

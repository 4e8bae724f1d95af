// The gradient of a convolution's weight: terms run over pixels, in pairs of two images at the same place.
#pragma once

#include <vector>

#include "products.h"

namespace {

struct Gradient {
    int64_t images, groups, source[2], source_channels, error[2], error_channels, kernel[2], stride[2], padding[2],
        dilation[2];
};

// What a product takes: source images with zeros around, in pairs of two, and the error's, as codes.
struct GradientWork {
    Gradient g;
    int64_t padded[2], ins, outs, taps, chunk;
    const char* source;
    float* out;
    int threads;
    bool add;

    int64_t pixels() const { return g.error[0] * g.error[1]; }
    int64_t panels() const { return divide_up(ins, TILE_COLUMNS); }
    // Bytes of a line of the source that the error's line of the same number starts at, over all pairs of images.
    int64_t source_line(int64_t line) const {
        return (line / g.error[0] * padded[0] + line % g.error[0] * g.stride[0]) * padded[1] * g.source_channels * 4;
    }
    int64_t source_pixel() const { return g.stride[1] * g.source_channels * 4; }

    // Calls work(tile, channel of its first row) for each tile of a block of outputs; `work` says where `a` is.
    template <typename Work>
    void tiles(int64_t group, int64_t panel, int64_t tap, int64_t first, int64_t end, int64_t rows,
               const Work& work) const {
        const int64_t column = panel * TILE_COLUMNS;
        Tile tile;
        tile.columns = (int)std::min<int64_t>(TILE_COLUMNS, ins - column);
        tile.b = source + tap_offset(group, panel, tap);
        tile.bias = nullptr;
        tile.add = add;
        for (int64_t o = first; o < end; o += rows) {
            tile.rows = (int)std::min(rows, end - o);
            const int64_t channel = group * outs + o;
            for (int r = 0; r < tile.rows; ++r) tile.out[r] = out + ((channel + r) * taps + tap) * ins + column;
            work(tile, channel);
        }
    }
    int64_t tap_offset(int64_t group, int64_t panel, int64_t tap) const {
        const int64_t y = tap / g.kernel[1] * g.dilation[0], x = tap % g.kernel[1] * g.dilation[1];
        return ((y * padded[1] + x) * g.source_channels + group * ins + panel * TILE_COLUMNS) * 4;
    }
    // Calls work(group, panel, tap, first output, end) for blocks of outputs.
    template <typename Work>
    void items(int64_t block, const Work& work) const {
        const int64_t blocks = divide_up(outs, block);
        parallel_items(threads, g.groups * panels() * taps * blocks, [&](int64_t item) {
            const int64_t first = item % blocks * block, tap = item / blocks % taps;
            const int64_t panel = item / (blocks * taps) % panels(), group = item / (blocks * taps * panels());
            work(group, panel, tap, first, std::min(outs, first + block));
        });
    }
};

// Pairs of a line of two images of the error; a missing second one is zero.
void pack_error(const Gradient& g, const uint8_t* error, int64_t image, int64_t pixel, int64_t count, uint32_t* out,
                const Decoder& decode) {
    const int64_t size = g.error[0] * g.error[1] * g.error_channels;
    const uint8_t* first = error + image * size + pixel * g.error_channels;
    decode_pairs(first, image + 1 < g.images ? first + size : nullptr, count * g.error_channels, out, decode);
}

void multiply_gradient(const GradientWork& w, const uint8_t* error, int64_t start, int64_t some,
                       const Decoder& decode) {
    const Gradient& g = w.g;
    char* packed = second_buffer.reserve(w.chunk * w.pixels() * g.error_channels * 4 + PANEL_STEP);
    const int64_t lines = some * g.error[0], line_bytes = g.error[1] * g.error_channels * 4;
    std::vector<Stretch> stretches(lines);
    for (int64_t line = 0; line < lines; ++line) stretches[line] = {line * line_bytes, w.source_line(line)};
    parallel_items(w.threads, lines, [&](int64_t line) {
        pack_error(g, error, 2 * (start + line / g.error[0]), line % g.error[0] * g.error[1], g.error[1],
                   (uint32_t*)(packed + line * line_bytes), decode);
    });
    const Terms terms = {stretches.data(), lines, g.error[1], g.error_channels * 4, w.source_pixel()};
    w.items(8 * TILE_ROWS, [&](int64_t group, int64_t panel, int64_t tap, int64_t first, int64_t end) {
        w.tiles(group, panel, tap, first, end, TILE_ROWS, [&](Tile& tile, int64_t channel) {
            for (int r = 0; r < tile.rows; ++r) tile.a[r] = packed + (channel + r) * 4;
            multiply(tile, terms);
        });
    });
}

// The same through amx.h: blocks of 16 pixels, in the order of their pairs of images.
void multiply_gradient_blocks(const GradientWork& w, const uint8_t* error, int64_t start, int64_t some,
                              const Decoder& decode) {
    const Gradient& g = w.g;
    const int64_t channels = round_up(g.error_channels, BLOCK_ROWS), pixels = some * w.pixels();
    const int64_t blocks = divide_up(pixels, BLOCK_PAIRS), block_bytes = channels * BLOCK_BYTES;
    // For each block, the pairs of every channel in a row; a tile may read 31 rows past the last channel.
    char* packed = second_buffer.reserve((blocks + 1) * block_bytes + MOST_ROWS * BLOCK_BYTES);
    parallel_items(w.threads, blocks, [&](int64_t block) {
        uint32_t* pairs = (uint32_t*)own_buffer.reserve(BLOCK_PAIRS * channels * 4);
        for (int64_t pair = 0; pair < BLOCK_PAIRS; ++pair) {
            const int64_t pixel = block * BLOCK_PAIRS + pair;
            if (pixel < pixels) {
                pack_error(g, error, 2 * (start + pixel / w.pixels()), pixel % w.pixels(), 1, pairs + pair * channels,
                           decode);
            } else {
                std::memset(pairs + pair * channels, 0, channels * 4);
            }
        }
        for (int64_t c = 0; c < channels; c += BLOCK_ROWS) {
            transpose_pairs(pairs + c, channels, (uint32_t*)(packed + block * block_bytes + c * BLOCK_BYTES));
        }
    });
    // Blocks within a line of the source are read where they are; others are gathered once for many outputs.
    const bool in_place = g.error[1] % BLOCK_PAIRS == 0;
    const int64_t lines = in_place ? some * g.error[0] : 1, line_blocks = blocks / lines;
    std::vector<Stretch> stretches(lines);
    for (int64_t line = 0; line < lines; ++line) {
        stretches[line] = {line * line_blocks * block_bytes, in_place ? w.source_line(line) : 0};
    }
    const Terms terms = {stretches.data(), lines, line_blocks * BLOCK_PAIRS, block_bytes,
                         in_place ? w.source_pixel() : PANEL_STEP};
    w.items(8 * BLOCK_ROWS, [&](int64_t group, int64_t panel, int64_t tap, int64_t first, int64_t end) {
        char* gathered = nullptr;
        if (!in_place) {
            gathered = own_buffer.reserve(blocks * BLOCK_PAIRS * PANEL_STEP);
            const char* from = w.source + w.tap_offset(group, panel, tap);
            for (int64_t line = 0, pixel = 0; line < some * g.error[0]; ++line) {
                for (int64_t x = 0; x < g.error[1]; ++x, ++pixel) {
                    std::memcpy(gathered + pixel * PANEL_STEP, from + w.source_line(line) + x * w.source_pixel(),
                                PANEL_STEP);
                }
            }
            std::memset(gathered + pixels * PANEL_STEP, 0, (blocks * BLOCK_PAIRS - pixels) * PANEL_STEP);
        }
        std::optional<Blocks> registers(std::in_place);
        w.tiles(group, panel, tap, first, end, MOST_ROWS, [&](Tile& tile, int64_t channel) {
            if (gathered) tile.b = gathered;
            tile.a[0] = packed + channel * BLOCK_BYTES;
            tile.a[BLOCK_ROWS] = tile.a[0] + BLOCK_ROWS * BLOCK_BYTES;
            tile.row_step = BLOCK_BYTES;
            multiply_blocks(tile, terms);
        });
    });
}

void convolution_gradient(Gradient g, const uint8_t* source, const uint8_t* error, float* out, int threads,
                          const Decoder& decode_source, const Decoder& decode_error) {
    if (g.kernel[0] * g.kernel[1] == 1 && g.stride[0] * g.stride[1] == 1 && g.padding[0] + g.padding[1] == 0) {
        // Pixels of an image lie in one row.
        g.source[1] *= g.source[0], g.error[1] *= g.error[0];
        g.source[0] = g.error[0] = 1;
    }
    GradientWork w;
    w.g = g;
    w.ins = g.source_channels / g.groups, w.outs = g.error_channels / g.groups;
    w.taps = g.kernel[0] * g.kernel[1];
    int64_t* padded = w.padded;
    for (int k = 0; k < 2; ++k) padded[k] = (g.error[k] - 1) * g.stride[k] + (g.kernel[k] - 1) * g.dilation[k] + 1;
    const int64_t source_bytes = padded[0] * padded[1] * g.source_channels * 4;
    const int64_t error_bytes = w.pixels() * g.error_channels * 4, pairs = divide_up(g.images, 2);
    // Chunks whose bytes stay cached, and whose sums are long enough to be worth adding to the result.
    w.chunk = std::min(pairs, std::max(2 * CACHE / (source_bytes + error_bytes), divide_up(512, w.pixels())));
    char* packed_source = first_buffer.reserve(w.chunk * source_bytes + PANEL_STEP);
    w.source = packed_source, w.out = out, w.threads = threads;
    for (int64_t start = 0; start < pairs; start += w.chunk) {
        const int64_t some = std::min(w.chunk, pairs - start);
        parallel_items(threads, some * padded[0], [&](int64_t item) {
            const int64_t pair = item / padded[0], line = item % padded[0];
            const int64_t image = 2 * (start + pair);
            uint32_t* to = (uint32_t*)packed_source + item * padded[1] * g.source_channels;
            const int64_t y = line - g.padding[0];
            const bool exists = y >= 0 && y < g.source[0];
            const int64_t left = exists ? std::min(g.padding[1], padded[1]) : padded[1];
            const int64_t inside = std::min(padded[1] - left, g.source[1]);
            std::memset(to, 0, left * g.source_channels * 4);
            if (inside > 0) {
                const int64_t size = g.source[0] * g.source[1] * g.source_channels;
                const uint8_t* row = source + image * size + y * g.source[1] * g.source_channels;
                decode_pairs(row, image + 1 < g.images ? row + size : nullptr, inside * g.source_channels,
                             to + left * g.source_channels, decode_source);
            }
            const int64_t filled = left + inside;
            std::memset(to + filled * g.source_channels, 0, (padded[1] - filled) * g.source_channels * 4);
        });
        w.add = start > 0;
        (blocks_on ? multiply_gradient_blocks : multiply_gradient)(w, error, start, some, decode_error);
    }
}

}  // namespace

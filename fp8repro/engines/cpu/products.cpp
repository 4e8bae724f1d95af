// Products of FP8 operands on CPUs that multiply BF16: bytes are decoded to BF16 while they are packed, multiplied exactly
// and accumulated in FP32. Every element of a result is summed by one thread in one order, whatever the threads.

#include "gradient.h"
#include "products.h"
#include "walks.h"

namespace {

// Codes of a matrix and the distances between its rows and columns, of which one is 1.
struct Matrix {
    const uint8_t* codes;
    int64_t row, column;

    const uint8_t* at(int64_t i, int64_t j) const { return codes + i * row + j * column; }
};

// ---- Packing ----

// Columns [first, first + width) of a [terms, columns] matrix as a panel: pairs of terms, 64 columns apart, then zeros
// up to `pairs`.
void pack_panel(const Matrix& m, int64_t terms, int64_t pairs, int64_t first, int64_t width, uint32_t* out,
                const Decoder& decode) {
    if (m.column == 1) {
        for (int64_t k = 0; k < terms; k += 2) {
            const uint8_t* second = k + 1 < terms ? m.at(k + 1, first) : nullptr;
            decode_pairs(m.at(k, first), second, width, out + k / 2 * TILE_COLUMNS, decode);
        }
    } else {
        for (int64_t j = 0; j < width; j += 16) {
            const int some = (int)std::min<int64_t>(16, width - j);
            decode_transposed(m.at(0, first + j), m.column, some, terms, out + j, TILE_COLUMNS, decode);
        }
    }
    const int64_t filled = divide_up(terms, 2);
    std::memset(out + filled * TILE_COLUMNS, 0, (pairs - filled) * PANEL_STEP);
}

// Rows of a [rows, terms] matrix, each with its pairs of terms in a row.
struct Rows {
    const char* data;
    int64_t row_step, pair_step;  // bytes; `pair_step` from block to block for amx.h
};

constexpr int64_t MOST_PACKED_ROWS = 192;  // whole tiles of either kernel

// The same for amx.h: for each 16 pairs, those of all rows.
Rows pack_row_blocks(const Matrix& m, int64_t first, int64_t rows, int64_t terms, Buffer& buffer,
                     const Decoder& decode) {
    const int64_t blocks = divide_up(terms, 2 * BLOCK_PAIRS), step = round_up(rows, MOST_ROWS) * BLOCK_BYTES;
    char* out = buffer.reserve(blocks * step);
    if (m.column == 1) {
        for (int64_t i = 0; i < rows; ++i) {
            const uint8_t* codes = m.at(first + i, 0);
            for (int64_t block = 0; block < blocks; block += 2) {
                const int64_t k = block * 2 * BLOCK_PAIRS;
                __m512i values[2];
                decode(_mm512_maskz_loadu_epi8(first_bytes(terms - k), codes + k), values);
                char* to = out + block * step + i * BLOCK_BYTES;
                _mm512_storeu_si512(to, values[0]);
                if (block + 1 < blocks) _mm512_storeu_si512(to + step, values[1]);
            }
        }
    } else {
        uint32_t pairs[BLOCK_PAIRS][MOST_PACKED_ROWS];
        for (int64_t block = 0; block < blocks; ++block) {
            for (int64_t pair = 0; pair < BLOCK_PAIRS; ++pair) {
                const int64_t k = 2 * (block * BLOCK_PAIRS + pair);
                if (k >= terms) {
                    std::memset(pairs[pair], 0, sizeof pairs[pair]);
                    continue;
                }
                const uint8_t* second = k + 1 < terms ? m.at(first, k + 1) : nullptr;
                decode_pairs(m.at(first, k), second, rows, pairs[pair], decode);
            }
            for (int64_t i = 0; i < rows; i += BLOCK_ROWS) {
                transpose_pairs(pairs[0] + i, MOST_PACKED_ROWS, (uint32_t*)(out + block * step + i * BLOCK_BYTES));
            }
        }
    }
    return {out, BLOCK_BYTES, step};
}

Rows pack_rows(const Matrix& m, int64_t first, int64_t rows, int64_t terms, Buffer& buffer, const Decoder& decode) {
    const int64_t pairs = divide_up(terms, 2);
    if (m.column == 1) {
        uint16_t* out = (uint16_t*)buffer.reserve(rows * pairs * 4);
        for (int64_t i = 0; i < rows; ++i) {
            uint16_t* row = out + i * pairs * 2;
            row[pairs * 2 - 1] = 0;
            decode_row(m.at(first + i, 0), terms, row, decode);
        }
        return {(char*)out, pairs * 4, 4};
    }
    uint32_t* out = (uint32_t*)buffer.reserve(rows * pairs * 4);
    for (int64_t k = 0; k < terms; k += 2) {
        const uint8_t* second = k + 1 < terms ? m.at(first, k + 1) : nullptr;
        decode_pairs(m.at(first, k), second, rows, out + k / 2 * rows, decode);
    }
    return {(char*)out, 4, rows * 4};
}

// ---- Matrix products: out[b] = a[b] x panels[b], for two batch dimensions ----

struct Gemm {
    int64_t batches[2], rows, columns, terms;
    int64_t a_batch[2], a_row, a_column;
    int64_t b_batch[2], b_row, b_column;

    int64_t pairs() const { return round_up(divide_up(terms, 2), blocks_on ? BLOCK_PAIRS : 1); }
    int64_t panels() const { return divide_up(columns, TILE_COLUMNS); }
    int64_t panel_bytes() const { return pairs() * PANEL_STEP; }
};

void pack_right(const Gemm& g, const uint8_t* b, char* out, int threads, const Decoder& decode) {
    parallel_items(threads, g.batches[0] * g.batches[1] * g.panels(), [&](int64_t item) {
        const int64_t panel = item % g.panels(), batch = item / g.panels();
        const int64_t at = batch / g.batches[1] * g.b_batch[0] + batch % g.batches[1] * g.b_batch[1];
        const int64_t first = panel * TILE_COLUMNS;
        pack_panel({b + at, g.b_row, g.b_column}, g.terms, g.pairs(), first,
                   std::min<int64_t>(TILE_COLUMNS, g.columns - first), (uint32_t*)(out + item * g.panel_bytes()),
                   decode);
    });
}

// How a result is rounded as it is stored; format: null where it is not. `add`: to what the result's memory holds.
struct Rounded {
    const Format* format;
    Random random;
    bool add;

    // Some rows of products, `step` values apart, to rows of the result from `first` on, which is their logical index.
    void operator()(float* products, int64_t step, float* out, int64_t first, int64_t out_step, int64_t rows,
                    int64_t columns) const {
        if (columns == step && columns == out_step) columns *= rows, rows = 1;
        const Tensors tensors = {products, out, nullptr, FLOAT32, FLOAT32, NONE, false, add};
        const auto kernel = format->rounding == NEAREST ? run<float, false, false> : run<float, true, false>;
        Counts counts;
        for (int64_t row = 0; row < rows; ++row) {
            const int64_t to = first + row * out_step;
            kernel(tensors, row * step, to, 0, columns, (uint64_t)to, random, *format, counts);
        }
    }
};

void gemm(const Gemm& g, const uint8_t* a, const char* panels, const float* bias, float* out, int threads,
          const Decoder& decode, const Rounded& rounded) {
    const int64_t unit = tile_rows(blocks_on);
    const int64_t block = std::clamp(CACHE / (g.pairs() * 4) / unit * unit, round_up(48, unit), MOST_PACKED_ROWS);
    const int64_t blocks = divide_up(g.rows, block), batches = g.batches[0] * g.batches[1];
    // Few rows: share out the columns too; packing the rows again costs little.
    const int64_t wanted = divide_up(4 * threads, batches * blocks);
    const int64_t stripe = divide_up(g.panels(), std::min<int64_t>(wanted, g.panels()));
    const int64_t stripes = divide_up(g.panels(), stripe);
    parallel_items(threads, batches * blocks * stripes, [&](int64_t item) {
        const int64_t batch = item / (blocks * stripes);
        const int64_t first = item / stripes % blocks * block, rows = std::min(block, g.rows - first);
        const int64_t at = batch / g.batches[1] * g.a_batch[0] + batch % g.batches[1] * g.a_batch[1];
        const Matrix matrix = {a + at, g.a_row, g.a_column};
        const Rows packed = blocks_on ? pack_row_blocks(matrix, first, rows, g.terms, own_buffer, decode)
                                      : pack_rows(matrix, first, rows, g.terms, own_buffer, decode);
        std::optional<Blocks> registers;
        if (blocks_on) registers.emplace();
        const Stretch whole = {0, 0};
        const Terms terms = {&whole, 1, g.pairs(), packed.pair_step, PANEL_STEP};
        const int64_t from = item % stripes * stripe, to = std::min(from + stripe, g.panels());
        const int64_t left = from * TILE_COLUMNS, width = std::min(to * TILE_COLUMNS, g.columns) - left;
        const int64_t corner = (batch * g.rows + first) * g.columns + left;
        // What is added to a result must not be there before.
        float* products = rounded.add ? (float*)second_buffer.reserve(rows * width * 4) : out + corner;
        const int64_t step = rounded.add ? width : g.columns;
        for (int64_t panel = from; panel < to; ++panel) {
            const int64_t column = panel * TILE_COLUMNS;
            Tile tile;
            tile.b = panels + (batch * g.panels() + panel) * g.panel_bytes();
            tile.columns = (int)std::min<int64_t>(TILE_COLUMNS, g.columns - column);
            tile.bias = bias ? bias + column : nullptr;
            tile.row_step = packed.row_step;
            tile.add = false;
            for (int64_t i = 0; i < rows; i += tile_rows(blocks_on)) {
                tile.rows = (int)std::min(tile_rows(blocks_on), rows - i);
                for (int r = 0; r < tile.rows; ++r) {
                    tile.a[r] = packed.data + (i + r) * packed.row_step;
                    tile.out[r] = products + (i + r) * step + column - left;
                }
                multiply(tile, terms, blocks_on);
            }
        }
        // While the second-level cache has it; straight behind a tile, its stores would still be under way.
        if (rounded.format) rounded(products, step, out, corner, g.columns, rows, width);
    });
}

// ---- Convolutions with a weight: the forward product, and the error's as one phase per residue of the stride ----

// Output pixels (start + i * step) take source pixels i * source_step + dy, per tap; likewise in the other direction.
struct Phase {
    int64_t start[2], step[2], count[2], source_step[2], taps;
    struct Tap {
        int64_t d[2], weight;
    } tap[1];  // `taps` of them

    const Phase* next() const { return (const Phase*)(tap + taps); }
};

struct Convolution {
    int64_t images, groups, source[2], source_channels, out[2], out_channels, weight_taps, phases;
    Phase first;

    int64_t pairs() const { return source_channels / groups / 2; }
    int64_t columns() const { return out_channels / groups; }
    int64_t panels() const { return divide_up(columns(), TILE_COLUMNS); }
    int64_t panel_bytes() const { return weight_taps * pairs() * PANEL_STEP; }
};

// weight: [out, taps, in / groups] in memory; `terms_are_out` for the error's product, whose terms run over `out`.
void pack_weight(const Convolution& c, const uint8_t* weight, bool terms_are_out, char* out, int threads,
                 const Decoder& decode) {
    const int64_t terms = 2 * c.pairs(), columns = c.columns();
    const int64_t in = terms_are_out ? columns : terms, outs = terms_are_out ? terms : columns;
    const int64_t row = c.weight_taps * in;
    parallel_items(threads, c.groups * c.panels() * c.weight_taps, [&](int64_t item) {
        const int64_t tap = item % c.weight_taps, panel = item / c.weight_taps;
        const uint8_t* codes = weight + panel / c.panels() * outs * row + tap * in;
        const Matrix matrix = terms_are_out ? Matrix{codes, row, 1} : Matrix{codes, 1, row};
        const int64_t first = panel % c.panels() * TILE_COLUMNS;
        pack_panel(matrix, terms, c.pairs(), first, std::min<int64_t>(TILE_COLUMNS, columns - first),
                   (uint32_t*)(out + item * c.pairs() * PANEL_STEP), decode);
    });
}

// Rounds some rows of some images of a phase, in which no other thread has a pixel.
void round_pixels(const Convolution& c, const Phase& p, float* out, int64_t image, int64_t images, int64_t first,
                  int64_t rows, const Rounded& rounded) {
    // Neighbouring pixels are one run, and so are neighbouring whole rows.
    const bool line = p.step[1] == 1, whole = line && p.count[1] == c.out[1] && p.step[0] == 1;
    const int64_t runs[3] = {images, whole ? 1 : rows, line ? 1 : p.count[1]};
    const int64_t length = (whole ? rows : 1) * (line ? p.count[1] : 1) * c.out_channels;
    for (int64_t n = 0; n < runs[0]; ++n)
        for (int64_t i = 0; i < runs[1]; ++i)
            for (int64_t j = 0; j < runs[2]; ++j) {
                const int64_t y = p.start[0] + (first + i) * p.step[0], x = p.start[1] + j * p.step[1];
                const int64_t at = (((image + n) * c.out[0] + y) * c.out[1] + x) * c.out_channels;
                rounded(out + at, length, out, at, length, 1, length);
            }
}

// One stretch of rows of some images of a phase.
void convolve_block(const Convolution& c, const Phase& p, const uint8_t* source, const char* panels, const float* bias,
                    float* out, int64_t image, int64_t images, int64_t first, int64_t rows, const Decoder& decode,
                    const Rounded& rounded) {
    const int64_t channels = c.source_channels;
    int64_t low[2] = {p.tap[0].d[0], p.tap[0].d[1]}, high[2] = {low[0], low[1]};
    for (int64_t t = 1; t < p.taps; ++t) {
        for (int k = 0; k < 2; ++k) {
            low[k] = std::min(low[k], p.tap[t].d[k]);
            high[k] = std::max(high[k], p.tap[t].d[k]);
        }
    }
    // The source rows that are needed, decoded, with zeros around.
    const int64_t height = (rows - 1) * p.source_step[0] + high[0] - low[0] + 1;
    const int64_t width = (p.count[1] - 1) * p.source_step[1] + high[1] - low[1] + 1;
    uint16_t* decoded = (uint16_t*)own_buffer.reserve(images * height * width * channels * 2);
    const int64_t left = std::clamp<int64_t>(-low[1], 0, width);
    const int64_t inside = std::max<int64_t>(0, std::min(width - left, c.source[1] - std::max<int64_t>(low[1], 0)));
    for (int64_t line = 0; line < images * height; ++line) {
        uint16_t* to = decoded + line * width * channels;
        const int64_t y = first * p.source_step[0] + low[0] + line % height;
        if (y < 0 || y >= c.source[0]) {
            std::memset(to, 0, width * channels * 2);
            continue;
        }
        const int64_t pixel = ((image + line / height) * c.source[0] + y) * c.source[1] + std::max<int64_t>(low[1], 0);
        std::memset(to, 0, left * channels * 2);
        decode_row(source + pixel * channels, inside * channels, to + left * channels, decode);
        std::memset(to + (left + inside) * channels, 0, (width - left - inside) * channels * 2);
    }
    constexpr int64_t MOST_TAPS = 1024;
    Stretch stretches[MOST_TAPS];
    for (int64_t t = 0; t < p.taps; ++t) {
        const Phase::Tap& tap = p.tap[t];
        stretches[t] = {((tap.d[0] - low[0]) * width + tap.d[1] - low[1]) * channels * 2,
                        tap.weight * c.pairs() * PANEL_STEP};
    }
    const bool blocks = blocks_on && c.pairs() % BLOCK_PAIRS == 0;
    const Terms terms = {stretches, p.taps, c.pairs(), blocks ? BLOCK_BYTES : 4, PANEL_STEP};
    std::optional<Blocks> registers;
    if (blocks) registers.emplace();
    const int64_t pixels = images * rows * p.count[1];
    for (int64_t panel = 0; panel < c.groups * c.panels(); ++panel) {
        const int64_t group = panel / c.panels(), column = panel % c.panels() * TILE_COLUMNS;
        Tile tile;
        tile.b = panels + panel * c.panel_bytes();
        tile.columns = (int)std::min<int64_t>(TILE_COLUMNS, c.columns() - column);
        tile.bias = bias ? bias + group * c.columns() + column : nullptr;
        tile.add = false;
        int64_t n = 0, i = 0, j = 0;
        for (int64_t pixel = 0; pixel < pixels; pixel += tile_rows(blocks)) {
            tile.rows = (int)std::min(tile_rows(blocks), pixels - pixel);
            for (int r = 0; r < tile.rows; ++r) {
                const int64_t from = (n * height + i * p.source_step[0]) * width + j * p.source_step[1];
                tile.a[r] = (const char*)(decoded + from * channels + group * 2 * c.pairs());
                const int64_t y = p.start[0] + (first + i) * p.step[0], x = p.start[1] + j * p.step[1];
                const int64_t to = ((image + n) * c.out[0] + y) * c.out[1] + x;
                tile.out[r] = out + to * c.out_channels + group * c.columns() + column;
                if (++j == p.count[1]) {
                    j = 0;
                    if (++i == rows) i = 0, ++n;
                }
            }
            // The pixels of one line lie at equal distances; a tile that is not full would read past the last one.
            bool even = tile.rows == MOST_ROWS;
            for (int r = 2; r < MOST_ROWS && even; ++r) {
                even = r == BLOCK_ROWS || tile.a[r] - tile.a[r - 1] == tile.a[1] - tile.a[0];
            }
            tile.row_step = even ? tile.a[1] - tile.a[0] : 0;
            multiply(tile, terms, blocks);
        }
    }
    if (rounded.format) round_pixels(c, p, out, image, images, first, rows, rounded);
}

void convolve(const Convolution& c, const uint8_t* source, const char* panels, const float* bias, float* out,
              int threads, const Decoder& decode, const Rounded& rounded) {
    const Phase* phase = &c.first;
    for (int64_t k = 0; k < c.phases; ++k, phase = phase->next()) {
        const Phase& p = *phase;
        if (p.taps == 0) continue;
        // Enough pixels to reuse the weight, few enough for the cache.
        const int64_t line = p.source_step[0] * p.source_step[1] * p.count[1] * c.source_channels * 2;
        const int64_t most = std::max<int64_t>(1, CACHE / line);
        const int64_t rows = std::min(p.count[0], most);
        const int64_t share = std::max<int64_t>(1, c.images / (2 * threads));
        const int64_t images = rows < p.count[0] ? 1 : std::clamp<int64_t>(most / rows, 1, share);
        const int64_t blocks = divide_up(p.count[0], rows);
        parallel_items(threads, divide_up(c.images, images) * blocks, [&](int64_t item) {
            const int64_t image = item / blocks * images, first = item % blocks * rows;
            convolve_block(c, p, source, panels, bias, out, image, std::min(images, c.images - image), first,
                           std::min(rows, p.count[0] - first), decode, rounded);
        });
    }
}

}  // namespace

#define EXPORT __attribute__((visibility("default")))

extern "C" {

// Multiply by amx.h from now on, or no longer; gives whether it does. Panels that were packed before are of no use then.
EXPORT int32_t fp8repro_use_blocks(int32_t wanted) {
    blocks_on = wanted && request_blocks();
    return blocks_on;
}

// Panels of the right operand; `decoder`: BF16 bits of the 128 magnitudes of its format.
EXPORT void fp8repro_pack_right(const Gemm* g, const uint8_t* b, const uint16_t* decoder, char* panels,
                                int32_t threads) {
    pack_right(*g, b, panels, threads, Decoder(decoder));
}

// out [batches, rows, columns]. `b`: codes, or null where `panels` hold them already. `format`: see `Rounded`.
EXPORT void fp8repro_gemm(const Gemm* g, const uint8_t* a, const uint16_t* a_decoder, const uint8_t* b,
                          const uint16_t* b_decoder, const char* panels, const float* bias, float* out,
                          const Format* format, uint64_t seed, uint64_t stream, int32_t add, int32_t threads) {
    if (b) {
        char* fresh = first_buffer.reserve(g->batches[0] * g->batches[1] * g->panels() * g->panel_bytes());
        pack_right(*g, b, fresh, threads, Decoder(b_decoder));
        panels = fresh;
    }
    const Rounded rounded = {format, {Key(seed), stream, format && format->rounding == STOCHASTIC}, add != 0};
    gemm(*g, a, panels, bias, out, threads, Decoder(a_decoder), rounded);
}

EXPORT void fp8repro_pack_weight(const Convolution* c, const uint8_t* weight, const uint16_t* decoder,
                                 int32_t terms_are_out, char* panels, int32_t threads) {
    pack_weight(*c, weight, terms_are_out, panels, threads, Decoder(decoder));
}

// Source and out are [images, height, width, channels] in memory, which is how their elements count. Pixels without a tap
// are left as they are. `format`: see `Rounded`.
EXPORT void fp8repro_convolve(const Convolution* c, const uint8_t* source, const uint16_t* decoder, const char* panels,
                              const float* bias, float* out, const Format* format, uint64_t seed, uint64_t stream,
                              int32_t threads) {
    const Rounded rounded = {format, {Key(seed), stream, format && format->rounding == STOCHASTIC}, false};
    convolve(*c, source, panels, bias, out, threads, Decoder(decoder), rounded);
}

// out: [error channels, kernel, source channels / groups] in memory.
EXPORT void fp8repro_convolution_gradient(const Gradient* g, const uint8_t* source, const uint16_t* source_decoder,
                                          const uint8_t* error, const uint16_t* error_decoder, float* out,
                                          int32_t threads) {
    convolution_gradient(*g, source, error, out, threads, Decoder(source_decoder), Decoder(error_decoder));
}

}  // extern "C"

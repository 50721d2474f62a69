// L^-1 of one block A = L L^T (spd_invert_factor), in the memory of the result where that is dense: n^2 / 2 elements beside it count when
// a Hessian takes gigabytes.
//
// As tiles the lower triangle takes half of that memory, from the first row on, so that no row lies further on than it does in the matrix.
// Rows become tiles from the first one on, and rows again from the last one on, in runs of rows whose tiles end before the matrix has the
// first of them: after row a of c such a run goes to about row sqrt(2 a c), so they are a handful, each the work of all threads.

constexpr int64_t kFewestInPlace = 8;  // tile rows: the padding of the last one takes memory too

// The tiles of x (n, n) in its own memory, at a multiple of 64 bytes. Where they do not fit, or it is not dense, `first` is null.
template <class S>
Tiles<S> tiles_within(const Matrix& x, int64_t n) {
  constexpr int64_t kLine = 64 / sizeof(S);
  const bool dense = (x.column_stride == 1 || x.column_stride == -1) && x.row_stride == n * x.column_stride;
  if (!dense || tiles_of<S>(n) < kFewestInPlace || spd_tiles_size<S>(n) + kLine > n * n) return {nullptr};
  S* data = static_cast<S*>(x.data);
  if (x.column_stride > 0) return {data + -reinterpret_cast<uintptr_t>(data) % 64 / sizeof(S)};
  return {data + 1 - reinterpret_cast<uintptr_t>(data + 1) % 64 / sizeof(S) - kTileArea<S>, -kTileArea<S>, 3};
}

// How the memory of a block lies to that of the result
enum class Place { apart, same, transposed, other };

inline Place place_of(const Matrix& block, const Matrix& out, int64_t n) {
  struct Span {
    const char *begin, *end;
  };
  const auto span = [n](const Matrix& x) {
    const int64_t row = (n - 1) * x.row_stride, column = (n - 1) * x.column_stride;
    const int64_t first = (row < 0 ? row : 0) + (column < 0 ? column : 0), last = row + column - first;
    const char* data = static_cast<const char*>(x.data);
    return Span{data + first * element_size(x.dtype), data + (last + 1) * element_size(x.dtype)};
  };
  const Span read = span(block), written = span(out);
  if (read.end <= written.begin || written.end <= read.begin) return Place::apart;
  if (block.data != out.data || block.dtype != out.dtype) return Place::other;
  if (block.row_stride == out.row_stride && block.column_stride == out.column_stride) return Place::same;
  return block.row_stride == out.column_stride && block.column_stride == out.row_stride ? Place::transposed : Place::other;
}

// A matrix x (n, n) and its tiles, both in its memory: one becomes the other.
template <class S>
struct TilesWithin {
  static constexpr int64_t T = kTile<S>, kArea = kTileArea<S>;
  const Matrix& x;
  int64_t n;
  Tiles<S> tiles, buffer;  // buffer: room for kMaxSteps tiles a row, for the first run
  Team team;

  // The end of the run of tile rows that begins with a
  int64_t run_end(int64_t a) const {
    const int64_t room = a > 0 ? a * T * n - 64 : kMaxSteps * tiles_of<S>(n) * kArea;
    int64_t b = a;
    while (b < tiles_of<S>(n) && (b + 1) * (b + 2) / 2 * kArea <= room) ++b;
    return b;
  }
  void copy_rows(const Tiles<S>& from, int64_t count, const Tiles<S>& to) const {
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = 0; j <= i; ++j) __builtin_memcpy(tile_at(to, i, j), tile_at(from, i, j), kArea * sizeof(S));
  }
  // From the lower triangle
  void pack() const {
    for (int64_t a = 0, b; a < tiles_of<S>(n); a = b) {
      b = run_end(a);
      for_each(team, b - a, [&](int64_t i) { load_tile_row(x, n, a + i, a > 0 ? tiles : buffer); });
      if (a == 0) copy_rows(buffer, b, tiles);
    }
  }
  // Rows from a on, zero above the diagonal
  void unpack(int64_t a = 0) const {
    if (a == tiles_of<S>(n)) return;
    const int64_t b = run_end(a);
    unpack(b);
    if (a == 0) copy_rows(tiles, b, buffer);
    store_lower<S>([&](int64_t i, int64_t j) -> const S* { return tile_at(a > 0 ? tiles : buffer, i, j); }, a, b, n, x, team);
  }
};

template <class S>
bool in_place(const Job& job, int64_t n) {
  return tiles_within<S>(job.out, n).first && place_of(job.block, job.out, n) != Place::other;
}

template <class S>
int64_t inverse_factor_work(const Job& job, int64_t n) {
  return ((in_place<S>(job, n) ? 0 : spd_tiles_size<S>(n)) + spd_work_size<S>(n)) * static_cast<int64_t>(sizeof(S));
}

template <class S>
void inverse_factor(const Job& job, int64_t n, void* work, Team team) {
  constexpr int64_t T = kTile<S>;
  const Matrix &block = job.block, &out = job.out;
  const bool within = in_place<S>(job, n);
  const Tiles<S> tiles = within ? tiles_within<S>(out, n) : Tiles<S>{static_cast<S*>(work)};
  S* rest = static_cast<S*>(work) + (within ? 0 : spd_tiles_size<S>(n));
  const TilesWithin<S> rows{out, n, tiles, {rest}, team};
  const Place place = place_of(block, out, n);
  if (within && place == Place::transposed)
    for_each(team, tiles_of<S>(n), [&](int64_t i) {
      alignas(64) S tile[kTileArea<S>];
      for (int64_t j = 0; j <= i; ++j) {
        load_tile(block, n, n, i * T, j * T, tile);
        store_tile(tile, out, n, n, i * T, j * T);
      }
    });
  if (within && place != Place::apart)
    rows.pack();
  else
    for_each(team, tiles_of<S>(n), [&](int64_t i) { load_tile_row(block, n, i, tiles); });
  const auto each = [&](int64_t count, const auto& body) { for_each(team, count, body); };
  const bool finite = spd_prepare(tiles, n, static_cast<S>(job.damping));
  const int64_t info = finite ? spd_invert_factor(tiles, n, rest, each) : -1;
  *job.info = static_cast<int32_t>(info);
  if (info != 0) return fill_nan<S>(out, n);
  if (within) return rows.unpack();
  store_lower<S>([&](int64_t i, int64_t j) -> const S* { return tile_at(tiles, i, j); }, 0, tiles_of<S>(n), n, out, team);
}

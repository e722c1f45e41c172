// SPDX-License-Identifier: Apache-2.0
//
// Which bytes a transfer moves, and the documented rules for that. All functions throw LLM_PARAM_INVALID.
#pragma once

#include <vector>

#include "caches.h"
#include "link.h"

namespace standin {

using Blocks = std::vector<uint64_t>;

// check_layers checks what every transfer demands of its layer ranges.
void check_layers(const llm_datadist::KvCacheExtParam &ext);

// A range of tensors; all of them where count is 0.
struct Tensors {
  uint64_t first = 0;
  uint64_t count = 0;

  uint64_t counted(const Entry &entry) const { return count != 0 ? count : entry.addresses.size(); }
};

// The two sides of the layers of a pull, checked against the local cache, and of one layer of a push.
struct Layers {
  Tensors src;
  Tensors dst;
};
Layers pulled_layers(const llm_datadist::KvCacheExtParam &ext, const Entry &local);
Layers pushed_layer(int64_t src_layer, int64_t dst_layer, uint64_t per_layer, const Entry &local);

// pull_row moves bytes of a row. The row at the peer is counted in local rows, as the library does it.
std::vector<Piece> pull_row(const Layers &layers, const Entry &local, uint64_t row, const Entry &remote, uint64_t remote_row,
                            uint64_t bytes);
void check_blocks(const Blocks &src, const Blocks &dst);
std::vector<Piece> pull_blocks(const Layers &layers, const Entry &local, const Blocks &dst, const Entry &remote, const Blocks &src);
std::vector<Piece> push_row(const Layers &layers, const Entry &local, uint64_t row, const Entry &remote, uint64_t remote_row);
std::vector<Piece> push_blocks(const Layers &layers, const Entry &local, const Blocks &src, const Entry &remote, const Blocks &dst);

}  // namespace standin

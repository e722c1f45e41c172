// SPDX-License-Identifier: Apache-2.0

#include "transfers.h"

#include <algorithm>

using namespace llm_datadist;

namespace standin {
namespace {

constexpr uint64_t kMostDescriptors = 131064;

// A run of blocks that follow one another on both sides.
struct Run {
  uint64_t src;
  uint64_t dst;
  uint64_t blocks;
};

std::vector<Run> merged(const Blocks &src, const Blocks &dst) {
  std::vector<Run> runs;
  for (size_t i = 0; i < src.size(); i++) {
    if (i > 0 && src[i] == src[i - 1] + 1 && dst[i] == dst[i - 1] + 1) {
      runs.back().blocks++;
    } else {
      runs.push_back({src[i], dst[i], 1});
    }
  }
  return runs;
}

// The part of each tensor that one piece moves.
struct Part {
  uint64_t local;
  uint64_t remote;
  uint64_t bytes;
};

// pieces moves the same parts of each pair of tensors.
std::vector<Piece> pieces(const Tensors &ours, const Entry &local, const Tensors &theirs, const Entry &remote,
                          const std::vector<Part> &parts) {
  const uint64_t tensors = ours.counted(local);
  require(tensors == theirs.counted(remote) && theirs.first + tensors <= remote.addresses.size());
  require(tensors + 2 * parts.size() <= kMostDescriptors);
  std::vector<Piece> all;
  for (uint64_t i = 0; i < tensors; i++) {
    for (const Part &part : parts) {
      all.push_back({local.addresses[ours.first + i] + part.local, remote.addresses[theirs.first + i] + part.remote, part.bytes});
    }
  }
  return all;
}

}  // namespace

void check_layers(const KvCacheExtParam &ext) {
  for (const auto &range : {ext.src_layer_range, ext.dst_layer_range}) {
    require(range.first >= -1 && range.second >= -1 && range.first <= range.second);
  }
  require(ext.tensor_num_per_layer > 0);
}

Layers pulled_layers(const KvCacheExtParam &ext, const Entry &local) {
  const auto [src_first, src_last] = ext.src_layer_range;
  const auto [dst_first, dst_last] = ext.dst_layer_range;
  if (src_first < 0 || dst_first < 0) return {};
  const uint64_t n = ext.tensor_num_per_layer;
  require(src_last - src_first == dst_last - dst_first && local.addresses.size() % n == 0);
  const uint64_t count = n * static_cast<uint64_t>(src_last - src_first + 1);
  const Layers layers{{src_first * n, count}, {dst_first * n, count}};
  require(layers.dst.first + count <= local.addresses.size());
  return layers;
}

Layers pushed_layer(int64_t src_layer, int64_t dst_layer, uint64_t per_layer, const Entry &local) {
  const auto layers = static_cast<int64_t>(local.addresses.size() / per_layer);
  require(local.addresses.size() % per_layer == 0 && src_layer < layers && dst_layer >= 0);
  return {{static_cast<uint64_t>(src_layer) * per_layer, per_layer}, {static_cast<uint64_t>(dst_layer) * per_layer, per_layer}};
}

std::vector<Piece> pull_row(const Layers &layers, const Entry &local, uint64_t row, const Entry &remote, uint64_t remote_row,
                            uint64_t bytes) {
  require(bytes <= remote.row_bytes);
  return pieces(layers.dst, local, layers.src, remote, {{row * local.row_bytes, remote_row * local.row_bytes, bytes}});
}

void check_blocks(const Blocks &src, const Blocks &dst) { require(!src.empty() && src.size() == dst.size()); }

std::vector<Piece> pull_blocks(const Layers &layers, const Entry &local, const Blocks &dst, const Entry &remote, const Blocks &src) {
  const uint64_t block = local.row_bytes;
  std::vector<Part> parts;
  for (const Run &run : merged(src, dst)) {
    require(run.dst < local.rows && run.blocks <= local.rows - run.dst);
    require(run.src < (remote.tensor_bytes() + block - 1) / block && run.blocks * block <= remote.tensor_bytes());
    parts.push_back({run.dst * block, run.src * block, run.blocks * block});
  }
  return pieces(layers.dst, local, layers.src, remote, parts);
}

std::vector<Piece> push_row(const Layers &layers, const Entry &local, uint64_t row, const Entry &remote, uint64_t remote_row) {
  require(layers.dst.first / layers.dst.count < remote.addresses.size() / layers.dst.count);
  require(row < local.rows && remote_row < remote.rows);
  return pieces(layers.src, local, layers.dst, remote, {{row * local.row_bytes, remote_row * remote.row_bytes, local.row_bytes}});
}

std::vector<Piece> push_blocks(const Layers &layers, const Entry &local, const Blocks &src, const Entry &remote, const Blocks &dst) {
  require(layers.dst.first / layers.dst.count < remote.addresses.size() / layers.dst.count);
  require(*std::max_element(dst.begin(), dst.end()) < remote.rows);
  const uint64_t block = local.row_bytes;
  std::vector<Part> parts;
  for (const Run &run : merged(src, dst)) {
    require(run.src < local.rows && run.blocks <= local.rows - run.src);
    parts.push_back({run.src * block, run.dst * block, run.blocks * block});
  }
  return pieces(layers.src, local, layers.dst, remote, parts);
}

}  // namespace standin

// SPDX-License-Identifier: Apache-2.0

#include "caches.h"

#include <algorithm>

using namespace llm_datadist;

namespace standin {
namespace {

constexpr size_t kMostAddresses = 240;
constexpr size_t kMostDimensions = 31;
constexpr uint64_t kMostTableBytes = 1 << 20;

uint64_t element_bytes(ge::DataType type) {
  switch (type) {
    case ge::DT_INT8:
    case ge::DT_UINT8:
    case ge::DT_BOOL:
    case ge::DT_HIFLOAT8:
    case ge::DT_FLOAT8_E5M2:
    case ge::DT_FLOAT8_E4M3FN:
      return 1;
    case ge::DT_FLOAT16:
    case ge::DT_BF16:
    case ge::DT_INT16:
    case ge::DT_UINT16:
      return 2;
    case ge::DT_FLOAT:
    case ge::DT_INT32:
    case ge::DT_UINT32:
    case ge::DT_COMPLEX32:
      return 4;
    case ge::DT_DOUBLE:
    case ge::DT_INT64:
    case ge::DT_UINT64:
    case ge::DT_COMPLEX64:
      return 8;
    case ge::DT_COMPLEX128:
      return 16;
    default:
      return 0;
  }
}

uint64_t table_bytes(const Table &table) {
  uint64_t bytes = 24;
  for (const auto &[id, entry] : table) bytes += 64 + 8 * entry.addresses.size();
  return bytes;
}

}  // namespace

int64_t Caches::add(const CacheDesc &desc, const std::vector<uint64_t> &addresses) {
  require(!addresses.empty() && addresses.size() <= kMostAddresses && addresses.size() == desc.num_tensors);
  require(std::find(addresses.begin(), addresses.end(), 0) == addresses.end());
  require(!desc.shape.empty() && desc.shape.size() <= kMostDimensions);
  uint64_t bytes = element_bytes(desc.data_type);
  for (const int64_t dimension : desc.shape) {
    require(dimension > 0 && !__builtin_mul_overflow(bytes, static_cast<uint64_t>(dimension), &bytes));
  }
  require(bytes > 0);
  const auto rows = static_cast<uint64_t>(desc.shape[0]);
  std::lock_guard<std::mutex> lock(guard_);
  const auto made = table_.emplace(next_, Entry{rows, bytes / rows, addresses}).first;
  if (table_bytes(table_) > kMostTableBytes) {
    table_.erase(made);
    throw Failure{LLM_PARAM_INVALID};
  }
  for (const uint64_t address : addresses) ever_.push_back({address, bytes});
  return next_++;
}

void Caches::remove(int64_t id) {
  std::lock_guard<std::mutex> lock(guard_);
  table_.erase(id);
}

Entry Caches::find(int64_t id) {
  std::lock_guard<std::mutex> lock(guard_);
  auto found = table_.find(id);
  if (found == table_.end()) throw Failure{LLM_KV_CACHE_NOT_EXIST};
  return found->second;
}

std::vector<uint64_t> Caches::packed() {
  std::lock_guard<std::mutex> lock(guard_);
  std::vector<uint64_t> words;
  for (const auto &[id, entry] : table_) {
    words.insert(words.end(), {static_cast<uint64_t>(id), entry.rows, entry.row_bytes, entry.addresses.size()});
    words.insert(words.end(), entry.addresses.begin(), entry.addresses.end());
  }
  return words;
}

Table Caches::unpacked(const std::vector<uint64_t> &words) {
  Table table;
  for (auto at = words.begin(); at != words.end();) {
    const auto id = static_cast<int64_t>(at[0]);
    Entry entry{at[1], at[2], {at + 4, at + 4 + static_cast<ptrdiff_t>(at[3])}};
    at += 4 + static_cast<ptrdiff_t>(entry.addresses.size());
    table.emplace(id, std::move(entry));
  }
  return table;
}

bool Caches::reachable(uint64_t address, uint64_t bytes) {
  std::lock_guard<std::mutex> lock(guard_);
  return std::any_of(ever_.begin(), ever_.end(), [&](const Range &range) {
    return address >= range.address && bytes <= range.bytes && address - range.address <= range.bytes - bytes;
  });
}

}  // namespace standin

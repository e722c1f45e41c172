// SPDX-License-Identifier: Apache-2.0
//
// What one object has registered, and how the table of it travels.
#pragma once

#include <map>
#include <mutex>
#include <vector>

#include "llm_datadist.h"

namespace standin {

// Failure is thrown where a call ends with a status.
struct Failure {
  ge::Status status;
};

// require throws LLM_PARAM_INVALID where a documented condition does not hold.
inline void require(bool condition) {
  if (!condition) throw Failure{llm_datadist::LLM_PARAM_INVALID};
}

// What the device runtime says of memory that is not there, and of a peer that is gone.
constexpr ge::Status kDeviceMemoryError = 507053;
constexpr ge::Status kSuspectRemote = 507057;

// Rows are batches of a cache and blocks of a blocks cache: a registered cache is both.
struct Entry {
  uint64_t rows;
  uint64_t row_bytes;
  std::vector<uint64_t> addresses;

  uint64_t tensor_bytes() const { return rows * row_bytes; }
};
using Table = std::map<int64_t, Entry>;

class Caches {
 public:
  int64_t add(const llm_datadist::CacheDesc &desc, const std::vector<uint64_t> &addresses);
  void remove(int64_t id);
  // find throws LLM_KV_CACHE_NOT_EXIST for an id that is not registered.
  Entry find(int64_t id);
  std::vector<uint64_t> packed();
  static Table unpacked(const std::vector<uint64_t> &words);
  // reachable tells whether a range lies in a tensor that is or was registered: a peer's table may be older than ours.
  bool reachable(uint64_t address, uint64_t bytes);

 private:
  struct Range {
    uint64_t address;
    uint64_t bytes;
  };

  std::mutex guard_;  // guards all of it
  Table table_;
  std::vector<Range> ever_;
  int64_t next_ = 1;
};

}  // namespace standin

// SPDX-License-Identifier: Apache-2.0
//
// The objects behind the numbers that callers hold, and the one way in which they are called.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>

#include "library.h"

namespace cann {

// set_device binds the calling thread to a device. It throws a Refusal.
void set_device(const Library &library, int32_t device);

// One native LlmDataDist. The library allows calls from several threads, but none beside Finalize.
class Object {
 public:
  Object(const Library &library, uint64_t cluster_id, int32_t role, int32_t device);
  ~Object();
  Object(const Object &) = delete;
  Object &operator=(const Object &) = delete;

  // call runs a native call on this thread, bound to the object's device, beside other calls.
  template <typename Call>
  uint32_t call(Call &&run) {
    std::shared_lock<std::shared_mutex> lock(calls_);
    set_device(library_, device_);
    return run(native(), library_.members);
  }

  // finalize waits for the calls that are under way and keeps others out.
  void finalize();

 private:
  llm_datadist::LlmDataDist &native() { return *reinterpret_cast<llm_datadist::LlmDataDist *>(room_); }

  const Library &library_;
  const int32_t device_;
  std::shared_mutex calls_;  // shared by calls, alone for Finalize
  alignas(llm_datadist::LlmDataDist) unsigned char room_[kProbeRoom];
};

// keep returns a new number for an object, find its object, and take its object, forgetting the number. Both of these throw a Refusal
// for a number that no object has.
int64_t keep(std::shared_ptr<Object> object);
std::shared_ptr<Object> find(int64_t number);
std::shared_ptr<Object> take(int64_t number);

}  // namespace cann

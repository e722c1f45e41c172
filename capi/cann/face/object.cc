// SPDX-License-Identifier: Apache-2.0

#include "object.h"

#include <unordered_map>

#include "cann_face.h"

namespace cann {
namespace {

// Numbers count up from here, and none is used twice.
constexpr int64_t kFirstNumber = int64_t{1} << 52;

std::mutex guard;  // guards objects and next
std::unordered_map<int64_t, std::shared_ptr<Object>> objects;
int64_t next = kFirstNumber;

auto lookup(int64_t number) {
  auto found = objects.find(number);
  if (found == objects.end()) throw Refusal{CANN_FACE, CANN_UNKNOWN_OBJECT, "no object has the number " + std::to_string(number)};
  return found;
}

}  // namespace

void set_device(const Library &library, int32_t device) {
  const int32_t code = library.runtime.aclrtSetDevice(device);
  if (code != 0) {
    throw Refusal{CANN_RUNTIME, code, "aclrtSetDevice(" + std::to_string(device) + "): the runtime's error " + std::to_string(code)};
  }
}

Object::Object(const Library &library, uint64_t cluster_id, int32_t role, int32_t device) : library_(library), device_(device) {
  set_device(library, device);
  mark(room_);
  library.members.construct(&native(), cluster_id, static_cast<llm_datadist::LlmRole>(role));
  refuse_changes(room_, sizeof(llm_datadist::LlmDataDist), "llm_datadist::LlmDataDist");
}

Object::~Object() { library_.members.destruct(&native()); }

void Object::finalize() {
  std::unique_lock<std::shared_mutex> lock(calls_);
  set_device(library_, device_);
  (native().*library_.members.Finalize)();
}

int64_t keep(std::shared_ptr<Object> object) {
  std::lock_guard<std::mutex> lock(guard);
  objects.emplace(next, std::move(object));
  return next++;
}

std::shared_ptr<Object> find(int64_t number) {
  std::lock_guard<std::mutex> lock(guard);
  return lookup(number)->second;
}

std::shared_ptr<Object> take(int64_t number) {
  std::lock_guard<std::mutex> lock(guard);
  auto found = lookup(number);
  std::shared_ptr<Object> object = std::move(found->second);
  objects.erase(found);
  return object;
}

}  // namespace cann

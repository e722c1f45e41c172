// SPDX-License-Identifier: Apache-2.0
//
// The documented device runtime over host memory. A device address lies in a range without access rights, so that the host faults when it
// follows one; the bytes lie elsewhere, where only the copies here find them.

#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <utility>

#include "standin.h"

namespace {

using aclError = int32_t;

// The runtime's own numbers are not documented; these are the stand-in's.
enum : aclError {
  kSuccess = 0,
  kBadArgument = 900001,
  kRepeated = 900002,
  kNotInitialised = 900003,
  kNoDevice = 900004,
  kOutOfMemory = 900005,
  kWrongMemory = 900006,
};

struct Allocation {
  uint64_t bytes;
  std::unique_ptr<unsigned char[]> content;
};

std::mutex guard;  // guards all but thread_device, also while bytes are copied, so that none is freed meanwhile
bool initialised = false;
uint64_t used = 0;
std::map<uint64_t, Allocation> on_device;  // by address
std::map<void *, uint64_t> pinned;
thread_local int32_t thread_device = -1;

uint64_t setting(const char *name, uint64_t otherwise) {
  const char *text = std::getenv(name);
  return text != nullptr ? std::strtoull(text, nullptr, 0) : otherwise;
}

uint32_t devices() { return static_cast<uint32_t>(setting("STANDIN_DEVICES", 2)); }
uint64_t capacity() { return setting("STANDIN_DEVICE_BYTES", uint64_t{1} << 30); }

uint64_t pages(uint64_t bytes) {
  const auto page = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  return (bytes + page - 1) / page * page;
}

// ready tells whether a call on this thread may go on. The caller holds guard.
aclError ready() {
  if (!initialised) return kNotInitialised;
  return thread_device >= 0 ? kSuccess : kNoDevice;
}

// content returns where the bytes of a range lie that is wholly inside one allocation, or null.
unsigned char *content(uint64_t address, uint64_t bytes) {
  auto after = on_device.upper_bound(address);
  if (after == on_device.begin()) return nullptr;
  const auto &[begin, allocation] = *std::prev(after);
  const uint64_t offset = address - begin;
  if (offset > allocation.bytes || bytes > allocation.bytes - offset) return nullptr;
  return allocation.content.get() + offset;
}

// touches_device tells whether a range overlaps the pages of an allocation.
bool touches_device(uint64_t address, uint64_t bytes) {
  auto after = on_device.lower_bound(address + bytes);
  return after != on_device.begin() && std::prev(after)->first + pages(std::prev(after)->second.bytes) > address;
}

// The kernel copies what is the host's: a range that is not there is an error then, and no fault.
bool read_host(void *into, const void *from, uint64_t bytes) {
  const iovec local{into, bytes};
  const iovec remote{const_cast<void *>(from), bytes};
  return process_vm_readv(getpid(), &local, 1, &remote, 1, 0) == static_cast<ssize_t>(bytes);
}

bool write_host(void *into, const void *from, uint64_t bytes) {
  const iovec local{const_cast<void *>(from), bytes};
  const iovec remote{into, bytes};
  return process_vm_writev(getpid(), &local, 1, &remote, 1, 0) == static_cast<ssize_t>(bytes);
}

uint64_t number(const void *address) { return reinterpret_cast<uint64_t>(address); }

aclError copy(void *dst, const void *src, uint64_t bytes, int kind) {
  const bool from_device = kind == 2 || kind == 3;
  const bool to_device = kind == 1 || kind == 3;
  const void *from = from_device ? content(number(src), bytes) : touches_device(number(src), bytes) ? nullptr : src;
  void *to = to_device ? content(number(dst), bytes) : touches_device(number(dst), bytes) ? nullptr : dst;
  if (from == nullptr || to == nullptr) return kWrongMemory;
  std::memmove(to, from, bytes);
  return kSuccess;
}

}  // namespace

int standin_read(void *into, uint64_t address, uint64_t bytes) {
  std::lock_guard<std::mutex> lock(guard);
  if (!touches_device(address, bytes)) return read_host(into, reinterpret_cast<void *>(address), bytes) ? 0 : -1;
  const unsigned char *from = content(address, bytes);
  if (from == nullptr) return -1;
  std::memcpy(into, from, bytes);
  return 0;
}

int standin_write(uint64_t address, const void *from, uint64_t bytes) {
  std::lock_guard<std::mutex> lock(guard);
  if (!touches_device(address, bytes)) return write_host(reinterpret_cast<void *>(address), from, bytes) ? 0 : -1;
  unsigned char *into = content(address, bytes);
  if (into == nullptr) return -1;
  std::memcpy(into, from, bytes);
  return 0;
}

int32_t standin_thread_device(void) { return thread_device; }

#define ACL extern "C" __attribute__((visibility("default"))) aclError

ACL aclInit(const char *) {
  return standin::as_planned("aclInit", [] {
    std::lock_guard<std::mutex> lock(guard);
    return std::exchange(initialised, true) ? kRepeated : kSuccess;
  });
}

ACL aclrtGetDeviceCount(uint32_t *count) {
  return standin::as_planned("aclrtGetDeviceCount", [&]() -> aclError {
    std::lock_guard<std::mutex> lock(guard);
    if (!initialised) return kNotInitialised;
    if (count == nullptr) return kBadArgument;
    *count = devices();
    return kSuccess;
  });
}

ACL aclrtSetDevice(int32_t device) {
  return standin::as_planned("aclrtSetDevice", [&]() -> aclError {
    std::lock_guard<std::mutex> lock(guard);
    if (!initialised) return kNotInitialised;
    if (device < 0 || static_cast<uint32_t>(device) >= devices()) return kBadArgument;
    thread_device = device;
    return kSuccess;
  });
}

ACL aclrtResetDevice(int32_t device) {
  return standin::as_planned("aclrtResetDevice", [&]() -> aclError {
    if (device != thread_device) return kNoDevice;
    thread_device = -1;
    return kSuccess;
  });
}

ACL aclrtMalloc(void **made, size_t bytes, int policy) {
  return standin::as_planned("aclrtMalloc", [&]() -> aclError {
    std::lock_guard<std::mutex> lock(guard);
    if (const aclError code = ready()) return code;
    if (made == nullptr || bytes == 0 || policy < 0 || policy > 2) return kBadArgument;
    if (bytes > capacity() - used) return kOutOfMemory;
    void *range = mmap(nullptr, pages(bytes), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (range == MAP_FAILED) return kOutOfMemory;
    on_device[number(range)] = {bytes, std::unique_ptr<unsigned char[]>(new unsigned char[bytes])};
    used += bytes;
    *made = range;
    return kSuccess;
  });
}

ACL aclrtFree(void *range) {
  return standin::as_planned("aclrtFree", [&]() -> aclError {
    std::lock_guard<std::mutex> lock(guard);
    if (const aclError code = ready()) return code;
    auto found = on_device.find(number(range));
    if (found == on_device.end()) return kWrongMemory;
    munmap(range, pages(found->second.bytes));
    used -= found->second.bytes;
    on_device.erase(found);
    return kSuccess;
  });
}

ACL aclrtMallocHost(void **made, size_t bytes) {
  return standin::as_planned("aclrtMallocHost", [&]() -> aclError {
    std::lock_guard<std::mutex> lock(guard);
    if (const aclError code = ready()) return code;
    if (made == nullptr || bytes == 0) return kBadArgument;
    void *range = mmap(nullptr, pages(bytes), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (range == MAP_FAILED) return kOutOfMemory;
    pinned[range] = bytes;
    *made = range;
    return kSuccess;
  });
}

ACL aclrtFreeHost(void *range) {
  return standin::as_planned("aclrtFreeHost", [&]() -> aclError {
    std::lock_guard<std::mutex> lock(guard);
    if (const aclError code = ready()) return code;
    auto found = pinned.find(range);
    if (found == pinned.end()) return kWrongMemory;
    munmap(range, pages(found->second));
    pinned.erase(found);
    return kSuccess;
  });
}

ACL aclrtMemcpy(void *dst, size_t room, const void *src, size_t bytes, int kind) {
  return standin::as_planned("aclrtMemcpy", [&]() -> aclError {
    std::lock_guard<std::mutex> lock(guard);
    if (const aclError code = ready()) return code;
    if (bytes > room || kind < 0 || kind > 3) return kBadArgument;
    return copy(dst, src, bytes, kind);
  });
}

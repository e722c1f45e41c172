// SPDX-License-Identifier: Apache-2.0
//
// What the stand-in exports beside the documented names: control of its failures, for tests, and its device memory, for its own copies.
#pragma once

#include <cstdint>

extern "C" {

// standin_plan adds failures to what is planned, and returns 0, or -1 where it does not understand them. The variable STANDIN_FAULTS is
// planned first. Failures are separated by spaces and each is used once, by the next call of its entry:
//
//   Entry=fail:status           the call does nothing and returns the status
//   Entry=stall:status:millis   it waits first; then it returns the status, or where that is 0 does its work
//   Entry=late:status:millis    it does its work first; then it waits and returns the status, or where that is 0 its own
//
// An entry is a member of LlmDataDist, a function of the runtime, `link` (one cluster of LinkLlmClusters) or `serve` (one request of a
// peer). Numbers may be hexadecimal.
__attribute__((visibility("default"))) int standin_plan(const char *faults);

// standin_forget drops what is planned and was not used, and returns how many failures these were.
__attribute__((visibility("default"))) int standin_forget(void);

// standin_waiting counts the calls that stall or are late now; standin_release ends their waits.
__attribute__((visibility("default"))) int standin_waiting(void);
__attribute__((visibility("default"))) void standin_release(void);

// ---- between the libraries of the stand-in

enum StandinAction { kNone, kFail, kStall, kLate };
struct StandinFault {
  StandinAction action;
  uint32_t status;
  int millis;
};
__attribute__((visibility("default"))) StandinFault standin_take(const char *entry);
__attribute__((visibility("default"))) void standin_wait(int millis);

// standin_thread_device returns the device that the calling thread is bound to, or -1.
__attribute__((visibility("default"))) int32_t standin_thread_device(void);

// standin_read and standin_write copy out of and into device or host memory, and return 0, or -1 where it is not all there.
__attribute__((visibility("default"))) int standin_read(void *into, uint64_t address, uint64_t bytes);
__attribute__((visibility("default"))) int standin_write(uint64_t address, const void *from, uint64_t bytes);

}  // extern "C"

namespace standin {

// as_planned runs the work of an entry, or what is planned in its place.
template <typename Work>
auto as_planned(const char *entry, Work &&work) -> decltype(work()) {
  const StandinFault fault = standin_take(entry);
  const auto planned = static_cast<decltype(work())>(fault.status);
  if (fault.action == kFail) return planned;
  if (fault.action == kStall) {
    standin_wait(fault.millis);
    if (planned != 0) return planned;
  }
  const auto result = work();
  if (fault.action != kLate) return result;
  standin_wait(fault.millis);
  return planned != 0 ? planned : result;
}

}  // namespace standin

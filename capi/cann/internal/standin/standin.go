// SPDX-License-Identifier: Apache-2.0

// Package standin tells the stand-in for the vendor's libraries (tests/native) to fail, to stall and to go on. It is for tests of capi/cann,
// which themselves can't use cgo, and expects the stand-in in the process already.
package standin

// #cgo LDFLAGS: -ldl
// #include <dlfcn.h>
// #include <stddef.h>
// #include <stdint.h>
//
// static int (*plan)(const char *);
// static int (*waiting)(void);
// static void (*release)(void);
//
// static int standin_find(const uint8_t *path) {
//   void *handle = dlopen((const char *)path, RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD);
//   if (handle == NULL) return -1;
//   *(void **)&plan = dlsym(handle, "standin_plan");
//   *(void **)&waiting = dlsym(handle, "standin_waiting");
//   *(void **)&release = dlsym(handle, "standin_release");
//   return plan != NULL && waiting != NULL && release != NULL ? 0 : -1;
// }
// static int standin_plan(const uint8_t *faults) { return plan((const char *)faults); }
// static int standin_waiting(void) { return waiting(); }
// static void standin_release(void) { release(); }
import "C"

import (
	"fmt"
	"path/filepath"
)

// Find looks the stand-in up that was loaded from folder. It comes before everything else, once.
func Find(folder string) error {
	path := filepath.Join(folder, "libacl_rt.so")
	if C.standin_find(text(path)) != 0 {
		return fmt.Errorf("%s is not loaded, or no stand-in", path)
	}
	return nil
}

// Plan adds failures to what is planned: tests/native/standin.h says how they are written.
func Plan(faults string) error {
	if C.standin_plan(text(faults)) != 0 {
		return fmt.Errorf("the stand-in does not understand %q", faults)
	}
	return nil
}

// Waiting counts the calls that stall now.
func Waiting() int { return int(C.standin_waiting()) }

// Release ends the waits of all of them.
func Release() { C.standin_release() }

func text(s string) *C.uint8_t {
	return (*C.uint8_t)(&append([]byte(s), 0)[0])
}

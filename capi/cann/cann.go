// SPDX-License-Identifier: Apache-2.0

// Package cann is the Go side of the vendor's library libllm_datadist.so and of the device runtime beside it: [Object] is a library of a
// direct transport, [Device] a device of the engine.
//
// Neither library is linked. They are reached through libcann_face.so (the C++ in face/), which [Load] loads when it is asked to and finds
// something to load: until then no C++ runtime comes into the process. What was loaded stays so until the process ends. Addresses cross to
// C as numbers, and no pointer to Go memory is kept there.
//
// Every failure is a [*status.Error]: what the library or the runtime say keeps its code where it is a documented one, and is
// status.Failed with the number in the text otherwise. What can't be loaded is status.FeatureNotEnabled.
package cann

// #cgo LDFLAGS: -ldl
// #include "shim.h"
import "C"

import (
	_ "embed"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/llm-datadist-open/llm-datadist/core/status"
)

// The header of the face is an input of this package that the go command doesn't see: as an embedded file it is one, and a change of it
// is compiled.
//
//go:embed face/cann_face.h
var _ string

const (
	libraryFile = "libllm_datadist.so"
	faceFile    = "libcann_face.so"

	// pathBytes is room for the paths of three libraries.
	pathBytes = 3 * 4096
)

var (
	loading  sync.Mutex // guards facePath, and keeps the loaders one at a time
	facePath string     // "": beside what this package is linked into
)

// UseFace names the file of the face, which is looked for beside the shared object that contains this package otherwise. It has no effect
// once a face was loaded.
func UseFace(path string) {
	loading.Lock()
	defer loading.Unlock()
	facePath = path
}

// Load loads the vendor's library and the device runtime from folder, or with "" from where the loader looks (LD_LIBRARY_PATH), then from
// lib64 of $ASCEND_HOME_PATH and of $ASCEND_TOOLKIT_HOME. It returns status.FeatureNotEnabled, with each place that was tried, where there
// is nothing to load, and loads nothing then. Loading twice is fine; two folders in one process are not.
func Load(folder string) error {
	loading.Lock()
	defer loading.Unlock()
	if Loaded() == "" {
		if err := look(folder); err != nil {
			return err
		}
	}
	path := facePath
	if path == "" {
		path = filepath.Join(filepath.Dir(C.GoString(C.shim_file())), faceFile)
	}
	if err := call(status.StageCheck, func(refusal *C.cann_error) C.int32_t { return C.shim_open(text(path), refusal) }); err != nil {
		return err
	}
	return call(status.StageCheck, func(refusal *C.cann_error) C.int32_t { return C.shim_load(text(folder), refusal) })
}

// look finds out whether there is a library to load.
func look(folder string) error {
	if folder != "" {
		file := filepath.Join(folder, libraryFile)
		if _, err := os.Stat(file); err != nil {
			return notFound(err.Error())
		}
		return nil
	}
	err := call(status.StageCheck, func(refusal *C.cann_error) C.int32_t { return C.shim_probe(text(libraryFile), refusal) })
	if err == nil {
		return nil
	}
	tried := []string{"by name (LD_LIBRARY_PATH): " + status.From(err, "").Cause}
	for _, variable := range []string{"ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME"} {
		home := C.GoString(C.shim_environment(text(variable)))
		if home == "" {
			tried = append(tried, "$"+variable+" is not set")
			continue
		}
		_, err := os.Stat(filepath.Join(home, "lib64", libraryFile))
		if err == nil {
			return nil
		}
		tried = append(tried, "$"+variable+"/lib64: "+err.Error())
	}
	return notFound(strings.Join(tried, "; "))
}

func notFound(tried string) error {
	return status.New(status.FeatureNotEnabled, status.StageCheck, libraryFile+" was not found: "+tried).
		Hinting("install the vendor's toolkit, and source its set_env.sh before the process starts")
}

// Loaded tells the paths of the libraries that are loaded, with spaces between them; "" where none is.
func Loaded() string {
	room := make([]byte, pathBytes)
	err := call(status.StageCheck, func(refusal *C.cann_error) C.int32_t {
		return C.shim_loaded((*C.uint8_t)(&room[0]), pathBytes, refusal)
	})
	if err != nil {
		return ""
	}
	lines, _, _ := strings.Cut(string(room), "\x00")
	return strings.Join(strings.Fields(lines), " ")
}

// Devices counts the devices of this machine that the runtime shows to this process.
func Devices() (int, error) {
	var count C.uint32_t
	err := call(status.StageCheck, func(refusal *C.cann_error) C.int32_t { return C.shim_device_count(&count, refusal) })
	return int(count), err
}

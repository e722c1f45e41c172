// SPDX-License-Identifier: Apache-2.0

// Package capi is the place for every line of C and cgo that talks to somebody else's native library: one folder a library, each a
// transport or a device that pyext/backend may put into an engine. Host memory and sockets need none. The C
// face in cann/face is a shared object of its own, in C++, which no Go package compiles; cann loads it when it is asked to.
package capi

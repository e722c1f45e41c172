// SPDX-License-Identifier: Apache-2.0

package mem

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// MaxSpans is the most spans that one system call takes (the kernel's IOV_MAX). What goes beyond is left for the next call.
const MaxSpans = 1024

// Span is a run of memory. It is laid out as the kernel's struct iovec on 64-bit machines, so that a list of spans can be given to a
// system call as it is.
type Span struct {
	Addr  uintptr
	Bytes uint64
}

// A machine where a Span is not an iovec doesn't compile.
var (
	_ [unsafe.Sizeof(Span{}) - unsafe.Sizeof(unix.Iovec{})]struct{}
	_ [unsafe.Sizeof(unix.Iovec{}) - unsafe.Sizeof(Span{})]struct{}
	_ [unsafe.Offsetof(Span{}.Bytes) - unsafe.Offsetof(unix.Iovec{}.Len)]struct{}
)

// ReceiveSpans fills spans, in order, from a socket with one recvmsg, and returns how many bytes came; 0 without an error is the end
// of the stream. It uses the first [MaxSpans] spans and never allocates. A failure is the bare unix.Errno (EAGAIN, EINTR, EFAULT
// where a span can't be written, ...); bytes that came before it are returned without it, and the next call reports it.
// No spans at all: 0, and no system call.
func ReceiveSpans(fd int, spans []Span, flags int) (int, error) {
	if len(spans) == 0 {
		return 0, nil
	}
	message := messageOf(spans)
	// Safe: message lives on this stack, which can't move during a system call, and the kernel checks the spans' addresses.
	n, _, errno := unix.Syscall(unix.SYS_RECVMSG, uintptr(fd), uintptr(unsafe.Pointer(&message)), uintptr(flags))
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

// SendSpans is the sending twin of [ReceiveSpans], with one sendmsg. MSG_NOSIGNAL is always added: a closed peer is EPIPE and
// never a signal to the host process.
func SendSpans(fd int, spans []Span, flags int) (int, error) {
	if len(spans) == 0 {
		return 0, nil
	}
	message := messageOf(spans)
	// Safe: as in ReceiveSpans.
	n, _, errno := unix.Syscall(unix.SYS_SENDMSG, uintptr(fd), uintptr(unsafe.Pointer(&message)), uintptr(flags|unix.MSG_NOSIGNAL))
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}

func messageOf(spans []Span) (message unix.Msghdr) {
	// Safe: a Span has the size and layout of an Iovec (asserted above), and the slice outlives the message.
	message.Iov = (*unix.Iovec)(unsafe.Pointer(unsafe.SliceData(spans)))
	message.SetIovlen(min(len(spans), MaxSpans))
	return message
}

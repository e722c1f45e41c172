// SPDX-License-Identifier: Apache-2.0

package mem

import (
	"encoding/binary"
	"fmt"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/llm-datadist-open/llm-datadist/core/status"
)

// VowBytes is what a vow takes of the pages of its process: 16 bytes, aligned to 8. The first 8 are the owner's (an address, which
// means nothing to anybody else); the word that peers look at is the uint64 at [VowWord] from the begin.
const (
	VowBytes = 16
	VowWord  = 8
)

// Vow makes the word at addr+[VowWord] one that is [Vowed] for as long as this process lives. When it dies, also by SIGKILL or exec, the
// kernel changes the word, so that whoever shares the page sees the death by a load. A stopped process lives. A forked child takes
// no part: neither its life nor its end is seen in the word.
//
// The page is one that only this process can write ([Pages]), and stays mapped until [Unvow]. Vow returns status.FeatureNotEnabled
// where the system has no robust futexes.
func Vow(addr uintptr) error {
	if addr == 0 || addr%wordBytes != 0 {
		return status.Newf(status.ParamInvalid, status.StageCheck, "a vow at %#x, which is not aligned to %d", addr, wordBytes)
	}
	if !littleEndian {
		return status.New(status.FeatureNotEnabled, status.StageCheck, "vows are not written for big-endian machines")
	}
	vows.Lock()
	defer vows.Unlock()
	if vows.keeper == nil {
		k, err := startKeeper()
		if err != nil {
			return err
		}
		vows.keeper = k
	}
	k := vows.keeper
	switch {
	case slices.Contains(k.nodes, addr):
		return status.Newf(status.ParamInvalid, status.StageCheck, "a second vow at %#x", addr)
	case len(k.nodes) == maxVows:
		return status.Newf(status.Failed, status.StageCheck, "there are %d vows, and the kernel looks at no more", maxVows)
	}
	k.change(func() { k.add(addr) })
	return nil
}

// Unvow takes the vow at addr back: its word is 0 when it returns. Without a vow there it does nothing.
func Unvow(addr uintptr) {
	vows.Lock()
	defer vows.Unlock()
	k := vows.keeper
	if k == nil || !slices.Contains(k.nodes, addr) {
		return
	}
	k.change(func() { k.remove(addr) })
	if len(k.nodes) == 0 {
		k.end()
		vows.keeper = nil
	}
}

// Vowed tells whether a word that was loaded from a vow's place says that its process lives. Words of no vow do not.
func Vowed(word uint64) bool {
	return word&futexThread != 0 && word&futexOwnerDied == 0
}

// Of the kernel's interface for robust futexes (linux/futex.h). A thread registers a list of words; when it ends, also because its
// process does, the kernel walks along the list and marks each word whose low bits are the thread's id.
const (
	futexThread    = 0x3fffffff // FUTEX_TID_MASK
	futexOwnerDied = 0x40000000 // FUTEX_OWNER_DIED; the thread's id is gone then
	maxVows        = 2048       // ROBUST_LIST_LIMIT
)

// littleEndian: the 32 bits that the kernel knows are the lower ones of the word that peers load.
var littleEndian = binary.NativeEndian.Uint16([]byte{1, 0}) == 1

// robustHead is struct robust_list_head. Nodes of the list are the first words of vows, each with the address of the next one; the last
// one's, or next where there is none, is the head's own.
type robustHead struct {
	next        uintptr
	futexOffset uintptr // from a node to its futex, the same for all: why node and word lie beside each other
	pending     uintptr // an element that is being added or taken out; not needed where the thread itself does both
}

// vows is what this process has vowed. (Its keeper is a goroutine of whoever makes the first vow: vows in bubbles of testing/synctest
// are made in one bubble at a time.)
var vows struct {
	sync.Mutex         // guards the keeper, and orders what it is told
	keeper     *keeper // nil while there is no vow
}

// keeper is the goroutine that keeps a thread to itself, whose end is that of all vows. It makes every change itself: done elsewhere, a
// change could come after the thread was killed, and before its author was.
type keeper struct {
	region  []byte        // a page
	head    uintptr       // the robustHead at its begin
	nodes   []uintptr     // the list from its end to its begin
	thread  uint64        // the thread's id
	changes chan func()   // closed to end the keeper
	changed chan struct{} // answers each change
	ended   chan struct{} // closed by the keeper
}

func startKeeper() (*keeper, error) {
	// Shared, since private memory may be taken away from a process that is being killed for want of memory, before its threads end.
	region, err := mapPages(-1, uint64(os.Getpagesize()), unix.MAP_SHARED|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, status.Newf(status.OutOfMemory, status.StageCheck, "map a page for the list of vows: %w", err)
	}
	keepFromChildren(region)
	k := &keeper{region: region, head: addressOf(region), changes: make(chan func()), changed: make(chan struct{}), ended: make(chan struct{})}
	// Safe: the page has room for a head and begins with it.
	list := (*robustHead)(pointer(k.head))
	list.next, list.futexOffset = k.head, VowWord
	ready := make(chan error)
	go k.keep(ready)
	if err := <-ready; err != nil {
		<-k.ended
		_ = unmapPages(region) // an munmap of our own page
		return nil, status.Newf(status.FeatureNotEnabled, status.StageCheck, "have the kernel announce this process's death: %w", err)
	}
	return k, nil
}

// keep is the keeper's life. The thread is the Go runtime's again when it returns, with the list that the C library may have given it.
func (k *keeper) keep(ready chan<- error) {
	defer close(k.ended)
	runtime.LockOSThread()
	before, err := robustList()
	if err == nil {
		err = setRobustList(k.head)
	}
	k.thread = uint64(unix.Gettid())
	ready <- err
	if err != nil {
		runtime.UnlockOSThread()
		return
	}
	for change := range k.changes {
		change()
		k.changed <- struct{}{}
	}
	if setRobustList(before) != nil {
		return // still locked, so the thread ends: it must not live on with this list. The kernel finds the head empty, and mapped
	}
	runtime.UnlockOSThread()
	_ = unmapPages(k.region) // an munmap of our own page
}

// change has the keeper do it, and returns when it is done.
func (k *keeper) change(what func()) {
	k.changes <- what
	<-k.changed
}

// end ends the keeper, which has no nodes, and returns when it has ended.
func (k *keeper) end() {
	close(k.changes)
	<-k.ended
}

// add puts a node before all others. The thread may be killed between any two of these stores: the list is whole at each of them, and
// a word is only ever vowed while it is in the list.
func (k *keeper) add(node uintptr) {
	atomic.StoreUint64(word(node+VowWord), 0)
	atomic.StoreUint64(word(node), uint64(k.newest()))
	atomic.StoreUint64(word(k.head), uint64(node))
	k.nodes = append(k.nodes, node)
	atomic.StoreUint64(word(node+VowWord), k.thread)
}

// remove is add backwards.
func (k *keeper) remove(node uintptr) {
	atomic.StoreUint64(word(node+VowWord), 0)
	at := slices.Index(k.nodes, node)
	before, after := k.head, k.head
	if at+1 < len(k.nodes) {
		before = k.nodes[at+1]
	}
	if at > 0 {
		after = k.nodes[at-1]
	}
	atomic.StoreUint64(word(before), uint64(after))
	k.nodes = slices.Delete(k.nodes, at, at+1)
}

// newest is the first element of the list, its head where it is empty.
func (k *keeper) newest() uintptr {
	if len(k.nodes) == 0 {
		return k.head
	}
	return k.nodes[len(k.nodes)-1]
}

// word is one in the head's page or in pages with a vow.
func word(addr uintptr) *uint64 {
	// Safe: both are aligned, and mapped for as long as the keeper has them.
	return (*uint64)(pointer(addr))
}

// robustList returns the list of the calling thread, 0 for none.
func robustList() (head uintptr, err error) {
	var bytes uintptr
	// Safe: the kernel writes two words, to variables that live as long as the call.
	_, _, errno := unix.RawSyscall(unix.SYS_GET_ROBUST_LIST, 0, uintptr(unsafe.Pointer(&head)), uintptr(unsafe.Pointer(&bytes)))
	if errno != 0 {
		return 0, fmt.Errorf("get_robust_list: %w", errno)
	}
	return head, nil
}

func setRobustList(head uintptr) error {
	_, _, errno := unix.RawSyscall(unix.SYS_SET_ROBUST_LIST, head, unsafe.Sizeof(robustHead{}), 0)
	if errno != 0 {
		return fmt.Errorf("set_robust_list: %w", errno)
	}
	return nil
}

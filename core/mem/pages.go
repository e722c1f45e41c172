// SPDX-License-Identifier: Apache-2.0

package mem

import (
	"fmt"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/llm-datadist-open/llm-datadist/core/status"
)

// pagesSealed makes size and seals final, so that a peer reads without fear of SIGBUS, and leaves writing to the mapping that was made
// before: whoever else gets the file can neither map nor write it.
const pagesSealed = unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_FUTURE_WRITE | unix.F_SEAL_SEAL

// Pages is memory that this process alone can write and that others, who are given a descriptor of it, can read: a sealed memfd,
// committed page by page when touched. A forked child doesn't have it.
type Pages struct{ memoryFile }

// NewPages makes pages of zeros, at least bytes of them; name is what the system shows for them. It returns status.OutOfMemory where
// there are none, and status.FeatureNotEnabled where the system can't keep others from writing (Linux before 5.1).
func NewPages(name string, bytes uint64) (*Pages, error) {
	if bytes == 0 || bytes > maxMapping {
		return nil, status.Newf(status.ParamInvalid, status.StageCheck, "%d bytes of shared pages", bytes)
	}
	p := new(Pages)
	if err := p.open(name, bytes); err != nil {
		return nil, noPages(bytes, err)
	}
	keepFromChildren(p.region)
	if err := p.seal(pagesSealed); err != nil {
		_ = p.Close() // nobody has seen it
		return nil, status.Newf(status.FeatureNotEnabled, status.StageCheck, "seal shared pages against writes of others: %w", err).
			Hinting("shared memory needs Linux 5.1 or newer")
	}
	return p, nil
}

func noPages(bytes uint64, err error) error {
	return status.Newf(status.OutOfMemory, status.StageCheck, "make %d bytes of shared pages: %w", bytes, err)
}

// keepFromChildren takes a mapping from children forked later, where nothing of ours runs and it would only keep memory from being
// given back. Where the system doesn't do that it is no harm.
func keepFromChildren(region []byte) { _ = unix.Madvise(region, unix.MADV_DONTFORK) }

// Words shows the pages as words, in which all sharing happens: others look at them at any time.
func (p *Pages) Words() []atomic.Uint64 { return words(p.region) }

// Close unmaps the pages and closes the memfd. Peers keep what they have mapped: say in it that it is dead before. Vows in the pages are
// taken back before, too. Closing twice is fine.
func (p *Pages) Close() error { return p.close(nil) }

// ReadOnly opens the file of fd a second time, for reading only, with a file offset of its own. The caller owns the new descriptor, which
// is not tracked.
func ReadOnly(fd int) (int, error) {
	for {
		opened, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", fd), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return -1, status.Newf(status.Failed, status.StageHandshake, "open descriptor %d again for reading: %w", fd, err)
		}
		return opened, nil
	}
}

// words shows a mapping as words; a last part of one is left out.
func words(region []byte) []atomic.Uint64 {
	// Safe: a mapping begins at a page, holds that many words, and stays until its owner's Close, after which the caller uses none.
	return unsafe.Slice((*atomic.Uint64)(unsafe.Pointer(unsafe.SliceData(region))), len(region)/wordBytes)
}

// wordBytes is the size of an atomic.Uint64, which is nothing but its value: else this doesn't compile.
const wordBytes = 8

var (
	_ [unsafe.Sizeof(atomic.Uint64{}) - wordBytes]struct{}
	_ [wordBytes - unsafe.Sizeof(atomic.Uint64{})]struct{}
)

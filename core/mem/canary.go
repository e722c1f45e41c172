// SPDX-License-Identifier: Apache-2.0

package mem

import (
	"crypto/rand"
	"os"

	"golang.org/x/sys/unix"

	"github.com/llm-datadist-open/llm-datadist/core/status"
)

// Canary is a random number in private memory of this process. A peer that reads another number there, or none, has not read this
// process: the id was given to another one, or the program was replaced by exec. A forked child doesn't have it.
type Canary struct {
	page  *Buffer
	value [16]byte
}

// NewCanary draws a number and puts it into a page of its own.
func NewCanary() (*Canary, error) {
	page, err := NewBuffer(os.Getpagesize())
	if err != nil {
		return nil, err
	}
	// Not a wish as elsewhere: a child with the same canary would pass for its parent.
	if err := unix.Madvise(page.Bytes(), unix.MADV_DONTFORK); err != nil {
		_ = page.Free() // an munmap of our own page
		return nil, status.Newf(status.Failed, status.StageCheck, "keep the canary from forked children: %w", err)
	}
	c := &Canary{page: page}
	_, _ = rand.Read(c.value[:]) // never fails
	copy(page.Bytes(), c.value[:])
	return c, nil
}

// Addr returns where the number is.
func (c *Canary) Addr() uintptr { return c.page.Addr() }

// Value returns the number.
func (c *Canary) Value() [16]byte { return c.value }

// Close takes the number away: from now on a peer's reads fail. Closing twice is fine.
func (c *Canary) Close() error { return c.page.Free() }

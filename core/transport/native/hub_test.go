// SPDX-License-Identifier: Apache-2.0

package native

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// patient is longer than anything here takes.
const patient = 10 * time.Second

// slowToUnlink is a library whose links are dropped when the test says so.
type slowToUnlink struct {
	Library
	begun, proceed chan struct{}
}

func (l *slowToUnlink) Unlink(uint64) error {
	l.begun <- struct{}{}
	<-l.proceed
	return nil
}

func (l *slowToUnlink) Close() error { return nil }

// A link of ours that takes another's place while the library still drops that one's link waits for it, and does not take what is gone for
// a link.
func TestWhoJoinsWhileTheLinkIsDroppedMakesItAnew(t *testing.T) {
	library := &slowToUnlink{begun: make(chan struct{}, 2), proceed: make(chan struct{})}
	hub := NewHub(library)
	first := hub.join(7)
	first.leave(func() {}) // does not wait for long
	<-library.begun
	second := hub.join(7)
	require.Same(t, first, second, "the token of the one is the other's")
	select {
	case <-second.turn:
		require.Fail(t, "the library still drops the link")
	default:
	}
	close(library.proceed)
	select {
	case <-second.turn:
	case <-time.After(patient):
		require.Fail(t, "the token has not come")
	}
	require.True(t, second.suspect)
	second.pass()
	second.leave(func() {})
	require.True(t, hub.Close(patient))
	require.Len(t, library.begun, 1, "and drops it, when it goes")
	require.Empty(t, hub.ends)
}

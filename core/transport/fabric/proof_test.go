// SPDX-License-Identifier: Apache-2.0

package fabric_test

import (
	"context"
	"errors"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/llm-datadist-open/llm-datadist/core/transport/fabric"
)

var (
	token = [16]byte{1}
	nonce = [16]byte{2}
)

// giving makes gifts: text, and as many new descriptors.
func giving(t *testing.T, text string, descriptors int) func() (fabric.Gift, error) {
	return func() (fabric.Gift, error) {
		gift := fabric.Gift{Bytes: []byte(text)}
		for range descriptors {
			fd, err := syscall.Open("/proc/self/status", syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
			require.NoError(t, err)
			gift.FDs = append(gift.FDs, fd)
		}
		return gift, nil
	}
}

// table is a table of descriptors.
type table struct {
	mu  sync.Mutex
	fds map[int]bool
}

func newTable() *table { return &table{fds: map[int]bool{}} }

func (t *table) descriptors() fabric.Descriptors {
	return fabric.Descriptors{Track: func(fd int) { t.set(fd, true) }, Untrack: func(fd int) { t.set(fd, false) }}
}

func (t *table) set(fd int, listed bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.fds[fd] == listed {
		panic("a descriptor was tracked or untracked twice")
	}
	t.fds[fd] = listed
	if !listed {
		delete(t.fds, fd)
	}
}

func requireOpen(t *testing.T, want bool, fds ...int) {
	t.Helper()
	for _, fd := range fds {
		var stat syscall.Stat_t
		err := syscall.Fstat(fd, &stat)
		require.Equal(t, want, err == nil, "descriptor %d: %v", fd, err)
	}
}

func isDead(w *fabric.Witness) bool {
	select {
	case <-w.Dead():
		return true
	default:
		return false
	}
}

// witnesses makes a proof between two hosts, a and b.
func witnesses(t *testing.T, n *fabric.Network) (atA, atB *fabric.Witness) {
	door, err := n.Host("b").OpenDoor(token, fabric.Descriptors{}, nil)
	require.NoError(t, err)
	claim := door.Expect(nonce)
	atA, err = n.Host("a").ReachDoor(context.Background(), token, nonce, fabric.Descriptors{}, nil)
	require.NoError(t, err)
	atB, err = claim()
	require.NoError(t, err)
	require.NoError(t, door.Close())
	return atA, atB
}

func TestProofPassesGiftsAsTheyAre(t *testing.T) {
	everywhere(t, func(t *testing.T) {
		n := newNetwork(t, 1)
		atDoor, atDialer := newTable(), newTable()
		door, err := n.Host("b").OpenDoor(token, atDoor.descriptors(), giving(t, "of b", 2))
		require.NoError(t, err)
		claim := door.Expect(nonce)
		ours, err := n.Host("a").ReachDoor(context.Background(), token, nonce, atDialer.descriptors(), giving(t, "of a", 8))
		require.NoError(t, err)
		_, err = n.Host("a").ReachDoor(context.Background(), token, nonce, atDialer.descriptors(), giving(t, "again", 1))
		require.ErrorContains(t, err, "does not expect")
		theirs, err := claim()
		require.NoError(t, err)
		require.Len(t, atDialer.fds, 2)
		require.Len(t, atDoor.fds, 8)
		require.Equal(t, os.Getpid(), ours.Pid())
		require.NoError(t, ours.Withheld())

		taken := ours.Take()
		require.Equal(t, "of b", string(taken.Bytes))
		requireOpen(t, true, taken.FDs...)
		require.Empty(t, atDialer.fds)
		require.Empty(t, ours.Take(), "taken once")
		ours.Close()
		requireOpen(t, true, taken.FDs...) // ours now
		for _, fd := range taken.FDs {
			require.NoError(t, syscall.Close(fd))
		}

		var waiting []int
		for fd := range atDoor.fds {
			waiting = append(waiting, fd)
		}
		theirs.Close() // nobody took it
		require.Empty(t, atDoor.fds)
		requireOpen(t, false, waiting...)
		require.Empty(t, theirs.Take())
		require.NoError(t, door.Close())
		require.ErrorIs(t, door.Close(), net.ErrClosed)
	})
}

func TestProofWithoutAGiftSaysWhy(t *testing.T) {
	n := newNetwork(t, 1)
	for name, gift := range map[string]func() (fabric.Gift, error){
		"error": func() (fabric.Gift, error) {
			made, _ := giving(t, "half of it", 2)()
			return made, errors.New("no descriptor is free")
		},
		"too long": giving(t, strings.Repeat("x", 1025), 1),
		"too many": giving(t, "", 9),
	} {
		t.Run(name, func(t *testing.T) {
			door, err := n.Host("b").OpenDoor(token, newTable().descriptors(), gift)
			require.NoError(t, err)
			claim := door.Expect(nonce)
			table := newTable()
			ours, err := n.Host("a").ReachDoor(context.Background(), token, nonce, table.descriptors(), nil)
			require.NoError(t, err)
			theirs, err := claim()
			require.NoError(t, err)
			require.Error(t, theirs.Withheld())
			require.NoError(t, ours.Withheld())
			require.Empty(t, ours.Take())
			require.Empty(t, table.fds)
			ours.Close()
			theirs.Close()
			require.NoError(t, door.Close())
		})
	}
}

func TestNobodyIsLetInUninvited(t *testing.T) {
	everywhere(t, func(t *testing.T) {
		n := newNetwork(t, 1)
		never := func() (fabric.Gift, error) {
			t.Error("a gift was made for nobody")
			return fabric.Gift{}, nil
		}
		reach := func() error {
			_, err := n.Host("a").ReachDoor(context.Background(), token, nonce, fabric.Descriptors{}, never)
			return err
		}
		require.ErrorIs(t, reach(), syscall.ECONNREFUSED)
		door, err := n.Host("b").OpenDoor(token, fabric.Descriptors{}, never)
		require.NoError(t, err)
		_, err = n.Host("c").OpenDoor(token, fabric.Descriptors{}, never)
		require.ErrorIs(t, err, syscall.EADDRINUSE)
		require.ErrorContains(t, reach(), "does not expect")
		_, err = door.Expect(nonce)()
		require.Error(t, err, "nobody came")
		require.ErrorContains(t, reach(), "does not expect")
		require.NoError(t, door.Close())
	})
}

func TestWitnessSeesDeathAndLettingGo(t *testing.T) {
	everywhere(t, func(t *testing.T) {
		n := newNetwork(t, 1)
		atA, atB := witnesses(t, n)
		require.False(t, isDead(atA))
		n.Host("b").Kill()
		<-atA.Dead()
		atA.Close()
		atB.Close()

		atA, atB = witnesses(t, n) // with the replacement
		atA.Close()
		atA.Close()
		<-atB.Dead()
		atB.Close()

		atA, atB = witnesses(t, n)
		n.Close()
		<-atA.Dead()
		<-atB.Dead()
		atA.Close()
		atB.Close()
	})
}

func TestDoorThatGoesWhileSomebodyComes(t *testing.T) {
	n := newNetwork(t, 1)
	table := newTable()
	door, err := n.Host("b").OpenDoor(token, table.descriptors(), giving(t, "of b", 1))
	require.NoError(t, err)
	claim := door.Expect(nonce)
	var given []int
	_, err = n.Host("a").ReachDoor(context.Background(), token, nonce, table.descriptors(), func() (fabric.Gift, error) {
		n.Host("b").Kill()
		gift, err := giving(t, "of a", 2)()
		given = gift.FDs
		return gift, err
	})
	require.ErrorIs(t, err, syscall.ECONNRESET)
	_, err = claim()
	require.Error(t, err)
	require.Empty(t, table.fds)
	requireOpen(t, false, given...)
}

func TestProofTakesItsTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNetwork(t, 1)
		a, b := n.Host("a"), n.Host("b")
		n.SetFaults(fabric.Faults{Latency: 10 * time.Millisecond})
		began := time.Now()
		atA, atB := witnesses(t, n)
		require.Equal(t, 20*time.Millisecond, time.Since(began))
		atA.Close()
		atB.Close()

		door, err := b.OpenDoor(token, fabric.Descriptors{}, nil)
		require.NoError(t, err)
		claim := door.Expect(nonce)
		for name, way := range map[string][2]func(){
			"partition": {func() { n.Partition(a, b) }, func() { n.Heal(a, b) }},
			"pause":     {b.Pause, b.Resume},
		} {
			way[0]()
			_, err = a.ReachDoor(ctxFor(t, time.Second), token, nonce, fabric.Descriptors{}, nil)
			require.ErrorIs(t, err, context.DeadlineExceeded, name)
			way[1]()
		}
		b.Pause()
		reached := start(func() error {
			w, err := a.ReachDoor(ctxFor(t, time.Minute), token, nonce, fabric.Descriptors{}, nil)
			if err == nil {
				w.Close()
			}
			return err
		})
		synctest.Wait()
		b.Resume()
		require.NoError(t, reached())
		w, err := claim()
		require.NoError(t, err)
		w.Close()

		b.Pause()
		claim = door.Expect(nonce)
		reached = start(func() error {
			_, err := a.ReachDoor(ctxFor(t, time.Minute), token, nonce, fabric.Descriptors{}, nil)
			return err
		})
		synctest.Wait()
		require.NoError(t, door.Close())
		require.ErrorIs(t, reached(), syscall.ECONNREFUSED)
		_, err = claim()
		require.Error(t, err)
	})
}

// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/llm-datadist-open/llm-datadist/core/cache"
	"github.com/llm-datadist-open/llm-datadist/core/status"
)

// Many calls at once on one engine, in real time, for the race detector: 16 pullers pull while caches are registered and unregistered
// on both ends, while links are made and dropped from both ends, and while one end is finalized at last.
func TestSixteenPullersWithUnregisterRelinkAndFinalizeAtOnce(t *testing.T) {
	over(t, []way{overTCP, overSHM, overFabric, overDirect}, func(w *world) {
		owner, puller := w.pair()
		c := &crowd{w: w, owner: owner, puller: puller, progress: make(chan struct{}, 1), finalized: make(chan struct{})}
		c.steady = owner.register(crowdDesc, two[0]).fill(1).content()
		for i := range c.versions {
			c.versions[i] = owner.prepare(crowdDesc).fill(uint64(2 + i)).content()
		}
		const pullers = 16
		pulling := begin(func() error { together(pullers, c.pull); return nil })
		relinking := begin(func() error { c.relink(); return nil })
		require.NoError(w.t, c.replace())
		require.NoError(w.t, relinking.wait())
		require.NoError(w.t, c.advance(pullers))
		owner.crash()
		close(c.finalized)
		require.NoError(w.t, pulling.wait())
		require.Zero(w.t, puller.Stats().Uses)
		requireCode(w.t, status.NotYetLink, puller.pull(owner, normal(7), puller.register(crowdDesc), all()))
	})
}

// crowd is two engines that everybody pulls at.
type crowd struct {
	w             *world
	owner, puller *node
	steady        [][]byte    // what key 7 leads to all the time
	versions      [2][][]byte // what key 8 leads to, one after the other
	good          atomic.Int64
	progress      chan struct{} // a pull has succeeded
	finalized     chan struct{} // the owner is gone
}

const crowdRounds = 20

var crowdDesc = rows(2, 1, 60_000)

// pull pulls into memory that is registered for each pull, until the owner is gone.
func (c *crowd) pull(i int) {
	dst := c.puller.prepare(crowdDesc)
	for round := 0; ; round++ {
		select {
		case <-c.finalized:
			return
		default:
		}
		require.NoError(c.w.t, dst.enter())
		c.pullOnce(dst, uint64(7+(i+round)%2), time.Duration(1+(i*round)%50)*10*time.Millisecond)
		dst.remove()
	}
}

func (c *crowd) pullOnce(dst *memory, key uint64, timeout time.Duration) {
	ctx, cancel := within(timeout)
	defer cancel()
	err := c.puller.pullWithin(ctx, c.owner, normal(key), dst, all())
	if err != nil {
		require.Contains(c.w.t, []status.Code{status.NotYetLink, status.Failed, status.CacheNotExist, status.Timeout}, status.CodeOf(err), "%v", err)
		if status.CodeOf(err) == status.NotYetLink {
			_ = c.puller.LinkClusters(ctx, []Cluster{c.owner.cluster()}) // it may be too late for that
		}
		return
	}
	if key == 7 {
		require.True(c.w.t, dst.equals(c.steady), "wrong bytes")
	} else {
		require.True(c.w.t, dst.equals(c.versions[0]) || dst.equals(c.versions[1]), "bytes of neither version")
	}
	c.good.Add(1)
	select {
	case c.progress <- struct{}{}:
	default:
	}
}

// advance waits for pulls to succeed.
func (c *crowd) advance(pulls int) error {
	for range pulls {
		select {
		case <-c.progress:
		case <-time.After(patient):
			return errors.New("no pull succeeds any more")
		}
	}
	return nil
}

// replace gives key 8 to one cache after the other; each one's memory is overwritten when it is out of the table.
func (c *crowd) replace() error {
	memory := c.owner.prepare(crowdDesc)
	for round := range crowdRounds {
		memory.fill(uint64(2 + round%2))
		if err := memory.enter(cache.Key{ID: 8}); err != nil {
			return err
		}
		if err := c.advance(3); err != nil {
			return err
		}
		memory.remove()
		memory.fill(99)
	}
	return nil
}

// relink drops and makes the link, from either end.
func (c *crowd) relink() {
	for round := range crowdRounds {
		who, other := c.owner, c.puller
		if round%2 == 0 {
			who, other = other, who
		}
		ctx, cancel := within(time.Second)
		_ = who.UnlinkClusters(ctx, []Cluster{other.cluster()}, round%3 == 0) // the pullers may be faster with anything here
		_ = other.LinkClusters(ctx, []Cluster{who.cluster()})
		cancel()
	}
}

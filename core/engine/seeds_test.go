// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/llm-datadist-open/llm-datadist/core/cache"
	"github.com/llm-datadist-open/llm-datadist/core/status"
	"github.com/llm-datadist-open/llm-datadist/core/transport"
	"github.com/llm-datadist-open/llm-datadist/core/transport/fabric"
)

// Faults by seed in virtual time. The invariant: each pull and push ends once, in time, with exactly the right bytes or with an error of the
// documented set; and nothing is left, in whatever moment a connection was cut or an engine died.

const seeds = 20

func TestPullsUnderFaultsBySeed(t *testing.T) { storms(t, (*storm).pulls) }

func TestPushesUnderFaultsBySeed(t *testing.T) { storms(t, (*storm).pushes) }

// worker is what one of a storm's callers does until stop is closed.
type worker func(s *storm, number int, n *node, owner Cluster, random *rand.Rand, stop chan struct{})

func storms(t *testing.T, work worker) {
	for _, a := range bubbles {
		t.Run(a.name, func(t *testing.T) {
			check(t)
			ended := map[status.Code]int64{}
			for seed := range uint64(seeds) {
				synctest.Test(t, func(t *testing.T) {
					s := newStorm(t, a, seed)
					defer s.abort()
					s.run(work)
					s.end()
					for code, times := range s.ended {
						ended[code] += times.Load()
					}
				})
				if t.Failed() {
					t.Fatalf("seed %d", seed)
				}
			}
			for _, code := range stormCodes {
				require.Greater(t, ended[code], int64(seeds/4), "a storm in which calls hardly ever end with %s", code)
			}
			t.Log(ended)
		})
	}
}

// storm is a world where an owner serves several pullers while things break.
type storm struct {
	*world
	random  *rand.Rand
	seed    uint64
	owner   *node
	want    [stormCaches][][]byte         // content of each cache, the same in each life of the owner
	current [stormCaches]atomic.Uint64    // the request id that leads to it
	ended   map[status.Code]*atomic.Int64 // pulls or pushes, by how they ended
	inboxes [stormWorkers]inbox
}

// inbox is what one caller pushes to: one cache in each life of the owner.
type inbox struct {
	mu    sync.Mutex
	lives []*memory
}

func (b *inbox) all() []*memory {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.lives)
}

// What the owner serves: caches of 2 tensors of one row each. The even ones are allocated, so that pulls consume their keys, and are
// offered again under new ids: a key that is known before its cache has been filled would be the application's mistake.
const stormCaches = 6

const stormWorkers = 6

func stormDesc(i uint64) cache.Desc { return rows(2, 1, int64(100+i*i*9_000)) }

func newStorm(t *testing.T, a way, seed uint64) *storm {
	s := &storm{world: newWorld(t, a, seed), seed: seed, random: rand.New(rand.NewPCG(seed, 1)), ended: map[status.Code]*atomic.Int64{}}
	for _, code := range stormCodes {
		s.ended[code] = &atomic.Int64{}
	}
	s.network.SetFaults(s.faults(false))
	s.rise()
	for i := range uint64(stormCaches) {
		s.want[i] = s.owner.prepare(stormDesc(i)).fill(i).content()
	}
	return s
}

// faults draws what goes wrong on connections.
func (s *storm) faults(cuts bool) fabric.Faults {
	f := fabric.Faults{
		Latency: time.Duration(s.random.IntN(5)) * time.Millisecond, Jitter: time.Duration(1+s.random.IntN(20)) * time.Millisecond,
		Tear: uint64(s.random.IntN(2) * (1 + s.random.IntN(5000))), Loss: 0.05 * s.random.Float64(),
		BytesPerSecond: uint64(s.random.IntN(2)) * 4 << 20,
	}
	if cuts {
		f.CutWithin, f.Refuse = 1+uint64(s.random.IntN(2_000_000)), 0.1
	}
	return f
}

// rise starts the owner, in the place of one that is dead.
func (s *storm) rise() {
	before := s.owner
	s.owner = s.node("owner", 1)
	if before != nil {
		require.NoError(s.t, s.owner.SwitchRole(""))
		require.NoError(s.t, s.owner.SwitchRole(before.address))
		s.owner.address = before.address
	}
	for i := range uint64(stormCaches) {
		s.offer(i)
	}
	for i := range s.inboxes {
		s.open(i)
	}
}

// open makes the inbox of a caller.
func (s *storm) open(number int) {
	made := s.owner.register(stormDesc(uint64(number)), inboxKey(number)).fill(1000)
	b := &s.inboxes[number]
	b.mu.Lock()
	defer b.mu.Unlock()
	b.lives = append(b.lives, made)
}

// reopen takes the inbox of a caller away for a while. Nothing is written into its memory from then on.
func (s *storm) reopen(number int) {
	lives := s.inboxes[number].all()
	gone := lives[len(lives)-1]
	gone.remove()
	content := gone.content()
	s.pass(time.Duration(s.random.IntN(400)) * time.Millisecond)
	require.True(s.t, gone.equals(content), "seed %d: written after it was unregistered", s.seed)
	s.open(number)
}

func inboxKey(number int) cache.Key { return cache.Key{ID: uint64(number), Model: stormCaches} }

// offer makes a cache, under a key that nobody has seen.
func (s *storm) offer(i uint64) {
	id := s.current[i].Load() + 1
	if i%2 == 1 {
		require.NoError(s.t, s.owner.prepare(stormDesc(i)).fill(i).enter(key(i, id)))
	} else {
		c := s.owner.allocate(stormDesc(i), key(i, id)).fill(i)
		require.NoError(s.t, s.owner.Deallocate(c.id, false))
	}
	s.current[i].Store(id)
}

// key names the cache i by a request id.
func key(i, id uint64) cache.Key { return cache.Key{ID: id, Model: i} }

func (s *storm) key(i uint64) transport.Key {
	return transport.Key{Kind: transport.KeyNormal, ID: s.current[i].Load(), Model: i}
}

func (s *storm) run(each worker) {
	pullers := []*node{s.node("first", 2), s.node("second", 3)}
	stop := make(chan struct{})
	owner := s.owner.cluster() // each life has the same id and address
	var work []*running
	for i := range stormWorkers {
		random := rand.New(rand.NewPCG(s.seed, uint64(10+i)))
		work = append(work, begin(func() error { each(s, i, pullers[i%2], owner, random, stop); return nil }))
	}
	for range 6 {
		s.pass(time.Duration(s.random.IntN(400)) * time.Millisecond)
		s.breakSomething()
		for i := uint64(0); i < stormCaches; i += 2 {
			s.offer(i)
		}
		s.reopen(s.random.IntN(stormWorkers))
	}
	close(stop)
	for _, each := range work {
		require.NoError(s.t, each.wait())
	}
	s.calm(pullers)
}

func (s *storm) breakSomething() {
	switch s.random.IntN(5) {
	case 0:
		s.network.SetFaults(s.faults(true))
	case 1:
		s.network.CutAll()
	case 2:
		s.owner.host.Pause()
		s.pass(time.Duration(s.random.IntN(3000)) * time.Millisecond)
		s.owner.host.Resume()
	case 3:
		s.owner.host.KillWithin(500_000)
		s.pass(time.Duration(s.random.IntN(1000)) * time.Millisecond)
		s.owner.crash()
		s.rise()
	default:
		s.network.SetFaults(s.faults(false))
	}
}

var stormCodes = []status.Code{status.Success, status.NotYetLink, status.CacheNotExist, status.Failed, status.Timeout}

// pulls pulls one cache after the other.
func (s *storm) pulls(_ int, n *node, owner Cluster, random *rand.Rand, stop chan struct{}) {
	var to []*memory
	for i := range uint64(stormCaches) {
		to = append(to, n.register(stormDesc(i)))
	}
	s.repeat(n, owner, random, stop, 0, func(ctx context.Context) error {
		i := random.Uint64N(stormCaches)
		dst := to[i].fill(1000)
		err := n.Pull(ctx, &PullCall{Cluster: *owner.ID, Key: s.key(i), Cache: dst.id, Plan: all()})
		if err == nil {
			require.True(s.t, dst.equals(s.want[i]), "seed %d: wrong bytes of cache %d", s.seed, i)
		}
		return err
	})
}

// pushes pushes one version after the other into an inbox of its own.
func (s *storm) pushes(number int, n *node, owner Cluster, random *rand.Rand, stop chan struct{}) {
	src, box, version := n.register(stormDesc(uint64(number))), &s.inboxes[number], uint64(0)
	key := transport.Key{Kind: transport.KeyNormal, ID: inboxKey(number).ID, Model: inboxKey(number).Model}
	s.repeat(n, owner, random, stop, time.Second, func(ctx context.Context) error {
		version++
		want := src.fill(version).content()
		err := n.Push(ctx, &PushCall{Cluster: *owner.ID, Key: key, Cache: src.id, Plan: all(), TensorsPerLayer: 2})
		if err == nil {
			require.True(s.t, slices.ContainsFunc(box.all(), func(dst *memory) bool { return dst.equals(want) }), "seed %d: wrong bytes", s.seed)
		}
		return err
	})
}

// repeat makes one call after the other, checks how each ends and when, within so much of its deadline, and links again where the link is
// gone.
func (s *storm) repeat(n *node, owner Cluster, random *rand.Rand, stop chan struct{}, late time.Duration, call func(context.Context) error) {
	for {
		select {
		case <-stop:
			return
		default:
		}
		timeout := time.Duration(1+random.IntN(1500)) * time.Millisecond
		ctx, cancel := context.WithTimeout(context.Background(), timeout)
		began := time.Now()
		err := call(ctx)
		took := time.Since(began)
		cancel()
		// Beyond the deadline: one batch of a direct read, one wait of a served one.
		require.LessOrEqual(s.t, took, timeout+late+500*time.Millisecond, "seed %d: %v", s.seed, err)
		code := status.CodeOf(err)
		require.Contains(s.t, stormCodes, code, "seed %d: %v", s.seed, err)
		s.ended[code].Add(1)
		if code == status.NotYetLink {
			ctx, cancel := within(time.Second)
			failure := n.LinkClusters(ctx, []Cluster{owner})[0]
			cancel()
			require.Contains(s.t, []status.Code{status.Success, status.AlreadyLink, status.LinkFailed, status.Timeout, status.Failed},
				status.CodeOf(failure), "seed %d: %v", s.seed, failure)
		}
		if err != nil {
			s.pass(40 * time.Millisecond)
		}
	}
}

// calm ends the faults, and everything works again: each end has let go of what the storm left half-way.
func (s *storm) calm(pullers []*node) {
	s.network.SetFaults(fabric.Faults{})
	s.pass(30 * time.Second) // deadlines, leases and silent links have ended by then
	require.Zero(s.t, s.owner.Stats().Leases, "seed %d", s.seed)
	require.Zero(s.t, s.owner.Stats().Uses, "seed %d", s.seed)
	for _, n := range pullers {
		if err := n.tryLink(s.owner); err != nil {
			requireCode(s.t, status.AlreadyLink, err)
		}
		require.Zero(s.t, n.Stats().Uses)
		for i := range uint64(stormCaches) {
			s.offer(i)
			dst := n.register(stormDesc(i))
			require.NoError(s.t, n.pull(s.owner, s.key(i), dst, all()), "seed %d", s.seed)
			require.True(s.t, dst.equals(s.want[i]), "seed %d", s.seed)
		}
	}
}

// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/llm-datadist-open/llm-datadist/core/directory"
	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/plan"
)

var (
	byItsID = directory.Name{}
	us      = [16]byte{15: 1}
)

func byBlocksKey(model uint64) directory.Name { return directory.Name{ByKey: true, Model: model} }
func blocksKey(model uint64) Key              { return Key{ID: NoID, Model: model} }

func TestDirectoryShowsAGenerationAsLongAsItsMemoryIsItsOwn(t *testing.T) {
	table := newTable(t)
	reader := table.Directory()
	e, err := table.Allocate(rows(2, 1, 100), []Key{key(1)})
	require.NoError(t, err)
	at, live := reader.Lookup(e.Generation)
	require.True(t, live)
	ref := directory.Ref{Generation: e.Generation}
	require.Equal(t, directory.Located{Ref: ref, Shape: e.Shape, Addrs: e.Addrs, Space: directory.Mapped}, at)
	require.True(t, reader.Named(ref, byItsID))
	require.False(t, reader.Live(directory.Ref{Generation: e.Generation + 1}))

	callers, err := table.Register(rows(1, 1, 100), []uintptr{8}, nil, true)
	require.NoError(t, err)
	at, live = reader.Lookup(callers.Generation)
	require.True(t, live)
	require.Equal(t, directory.Private, at.Space)

	lease, err := table.Open(byKey(key(1)))
	require.NoError(t, err)
	require.True(t, lease.Consumes())
	require.NoError(t, table.RemoveKey(key(1)))
	require.NoError(t, table.Deallocate(e.ID, false))
	require.False(t, reader.Named(ref, byItsID), "nothing leads to it any more")
	require.True(t, reader.Live(ref), "a lease holds it")
	lease.Drop()
	require.False(t, reader.Live(ref))
	_, live = reader.Lookup(e.Generation)
	require.False(t, live)
}

func TestDirectoryEndsAGenerationBeforeUnregisterReturns(t *testing.T) {
	table := newTable(t)
	e, err := table.Allocate(rows(1, 1, 100), []Key{key(1)})
	require.NoError(t, err)
	lease, err := table.Open(byKey(key(1)))
	require.NoError(t, err)
	require.NoError(t, table.Unregister(t.Context(), e.ID))
	require.False(t, table.Directory().Live(directory.Ref{Generation: e.Generation}), "not even under a lease")
	lease.Drop()
}

// owner is a table that peers on this host see, and such a peer.
type owner struct {
	*Table
	t         testing.TB
	publisher *directory.Publisher
	pages     *directory.Pages
	pools     []*mem.Mapping // as the peer has them
	held      []func()       // what ends the holds of leases and uses
}

// announced makes one. When the test ends nothing may be left.
func announced(t testing.TB, device mem.Device, devicePool, hostPool *PoolConfig) *owner {
	goroutines, before := runtime.NumGoroutine(), mappings(t)
	t.Cleanup(func() {
		require.Eventually(t, func() bool {
			// Eventually runs this on a goroutine of its own.
			return runtime.NumGoroutine() <= goroutines+1 && mappings(t) <= before
		}, 20*time.Second, time.Millisecond, "before: %d goroutines, %d mappings", goroutines, before)
	})
	table, err := NewTable(device, devicePool, hostPool)
	require.NoError(t, err)
	t.Cleanup(func() { requireNothingLeft(t, table) })
	o := &owner{Table: table, t: t}
	o.publisher, err = directory.NewPublisher(us)
	require.NoError(t, err)
	table.Announce(o.publisher)
	peer, err := mem.MapShared(o.publisher.FD(), o.publisher.Bytes(), mem.PagesSeals)
	require.NoError(t, err)
	o.pages, err = directory.OpenPages(peer, us)
	require.NoError(t, err)
	for _, pool := range table.SharedPools() {
		mapped, err := mem.MapShared(pool.FD(), pool.Bytes(), mem.PoolSeals)
		require.NoError(t, err)
		o.pools = append(o.pools, mapped)
	}
	t.Cleanup(func() {
		require.NoError(t, table.Close())
		for generation := range table.generation + 1 {
			require.False(t, o.found(generation))
		}
		require.NoError(t, o.publisher.Close())
		for _, m := range append(o.pools, peer) {
			require.NoError(t, m.Close())
		}
	})
	return o
}

func mappings(t testing.TB) int {
	maps, err := os.ReadFile("/proc/self/maps")
	require.NoError(t, err)
	return strings.Count(string(maps), "llm_datadist")
}

// twoPools is announced with the pools of newTable.
func twoPools(t testing.TB) *owner {
	config := &PoolConfig{Bytes: testPool, PageShift: 16}
	return announced(t, mem.Host(), config, config)
}

func (o *owner) register(desc Desc, keys ...Key) *Entry {
	e, err := o.Register(desc, make16(desc.Tensors), keys, true)
	require.NoError(o.t, err)
	return e
}

func (o *owner) allocate(desc Desc, keys ...Key) *Entry {
	e, err := o.Allocate(desc, keys)
	require.NoError(o.t, err)
	return e
}

func (o *owner) unregister(e *Entry) { require.NoError(o.t, o.Unregister(o.t.Context(), e.ID)) }
func (o *owner) removeKey(k Key)     { require.NoError(o.t, o.RemoveKey(k)) }
func (o *owner) deallocate(e *Entry) {
	require.NoError(o.t, o.Deallocate(e.ID, e.Shape.Kind == plan.Blocks))
}

func (o *owner) lease(k Key) *Source {
	lease, err := o.Open(byKey(k))
	require.NoError(o.t, err)
	require.True(o.t, lease.Consumes())
	return lease
}

// leases opens some on the cache of key(1), and uses begins a local operation: they last until release.
func (o *owner) leases(count int) {
	for range count {
		o.held = append(o.held, o.lease(key(1)).Drop)
	}
}

func (o *owner) uses(e *Entry) {
	use, err := o.Use(e.ID)
	require.NoError(o.t, err)
	o.held = append(o.held, use.Release)
}

func (o *owner) release(*Entry) {
	for _, end := range o.held {
		end()
	}
}

func (o *owner) found(generation uint64) bool {
	_, _, ok := o.pages.Find(generation)
	return ok
}

// find returns what the peer finds of an entry that is published.
func (o *owner) find(e *Entry) (directory.Record, directory.Ref) {
	r, ref, ok := o.pages.Find(e.Generation)
	require.True(o.t, ok)
	return r, ref
}

func TestWhatIsPublishedOfACache(t *testing.T) {
	o := twoPools(t)
	require.Equal(t, []*mem.HostMemory{o.Table.pools[Host].shared, o.Table.pools[Device].shared}, o.SharedPools())
	o.allocate(rows(1, 1, 1)) // the first page of the pool
	host := rows(2, 4, 100)
	host.Placement = Host
	for _, c := range []struct {
		desc Desc
		pool uint32
		at   []uintptr
	}{
		{rows(3, 2, 1<<16), 2, []uintptr{1 << 16, 3 << 16, 5 << 16}},
		{host, 1, []uintptr{0, 1 << 16}},
	} {
		e := o.allocate(c.desc, key(uint64(c.pool)))
		r, _ := o.find(e)
		require.Equal(t, directory.Record{
			ID: e.ID, Generation: e.Generation, Shape: e.Shape, Accessible: true, Pool: c.pool, Addrs: c.at,
		}, r)
		mem.View(e.Addrs[1], 1)[0] = byte(c.pool)
		require.Equal(t, byte(c.pool), mem.View(o.pools[c.pool-1].Addr()+r.Addrs[1], 1)[0], "what the peer has mapped there")
	}
	for _, accessible := range []bool{false, true} {
		e, err := o.Register(blocks(2, 8, 4), []uintptr{0x1001, 0x2002}, []Key{blocksKey(5)}, accessible)
		require.NoError(t, err)
		r, _ := o.find(e)
		require.Equal(t, directory.Record{
			ID: e.ID, Generation: e.Generation, Shape: e.Shape, Accessible: accessible, HasKey: true, Model: 5, Addrs: []uintptr{0x1001, 0x2002},
		}, r)
	}
}

func TestCachesThatNoPeerCouldReadAreNotPublished(t *testing.T) {
	config := &PoolConfig{Bytes: testPool, PageShift: 16}
	o := announced(t, &watched{Device: mem.Host(), discard: func() {}}, config, config)
	require.Len(t, o.SharedPools(), 1, "the device has no descriptor for its memory")
	e := o.allocate(blocks(1, 1, 1), blocksKey(1))
	require.False(t, o.found(e.Generation))
	o.removeKey(blocksKey(1))
	o.deallocate(e)
	host := rows(1, 1, 1)
	host.Placement = Host
	r, _ := o.find(o.allocate(host))
	require.EqualValues(t, 1, r.Pool)

	e, err := o.Register(rows(2, 1, 64), []uintptr{1, ^uintptr(0) - 8}, nil, true)
	require.NoError(t, err)
	require.False(t, o.found(e.Generation), "beyond the address space")
}

func TestCachesBeyondTheArenaOfTheDirectoryWorkWithoutIt(t *testing.T) {
	o := twoPools(t)
	const most = 1 << 20 // tensors that the directory has room for
	e := o.register(rows(most+1, 1, 1))
	require.False(t, o.found(e.Generation))
	o.unregister(e)
	e = o.register(rows(most, 1, 1))
	require.True(t, o.found(e.Generation))
	require.False(t, o.found(o.register(rows(1, 1, 1)).Generation), "no room")
	o.unregister(e)
	require.True(t, o.found(o.register(rows(1, 1, 1)).Generation))
}

func TestCachesBeyondTheSlotsOfTheDirectoryWorkWithoutIt(t *testing.T) {
	o := twoPools(t)
	const slots = 4096
	entries := make([]*Entry, slots+10)
	for i := range entries {
		entries[i] = o.register(rows(1, 1, 4))
		require.Equal(t, i < slots, o.found(entries[i].Generation))
	}
	for _, i := range []int{slots + 5, 7, 8} {
		o.unregister(entries[i])
		require.False(t, o.found(entries[i].Generation))
	}
	for i := range 3 {
		require.Equal(t, i < 2, o.found(o.register(rows(1, 1, 4)).Generation), "two slots were free again")
	}
}

// names is what a directory says of an entry; key is the blocks key of model 1.
type names struct{ live, id, key bool }

func namesIn(reader interface {
	Live(directory.Ref) bool
	Named(directory.Ref, directory.Name) bool
}, ref directory.Ref) names {
	return names{reader.Live(ref), reader.Named(ref, byItsID), reader.Named(ref, byBlocksKey(1))}
}

func TestNamesInTheDirectory(t *testing.T) {
	all, none, noKey, memory := names{true, true, true}, names{}, names{live: true, id: true}, names{live: true}
	k, everything := blocksKey(1), plan.Range{All: true}
	theBlocks, theRows := blocks(1, 2, 4), rows(1, 2, 4)
	registered := func(o *owner) *Entry { return o.register(theBlocks, k) }
	ownedBlocks := func(o *owner) *Entry { return o.allocate(theBlocks, k) }
	ownedRows := func(o *owner) *Entry { return o.allocate(theRows, key(1)) }
	cases := []struct {
		name    string
		make    func(o *owner) *Entry
		do, end func(o *owner, e *Entry) // nil: nothing
		done    names                    // after do
		ended   names                    // after end
	}{
		{"a registered cache", registered, nil, nil, all, all},
		{"an allocated cache", ownedBlocks, nil, nil, all, all},
		{"it has taken the key over", func(o *owner) *Entry { registered(o); return registered(o) }, nil, nil, all, all},
		{"rows have no such key", func(o *owner) *Entry { return o.register(theRows, key(1), k) }, nil, nil, noKey, noKey},
		{"nor a cache with another key", func(o *owner) *Entry { return o.register(theBlocks, key(1)) }, nil, nil, noKey, noKey},
		{"nor one with a prefix", func(o *owner) *Entry { return o.register(theBlocks, Key{ID: NoID, Model: 1, Prefix: true}) }, nil, nil, noKey, noKey},
		{"nor that of another model", func(o *owner) *Entry { return o.register(theBlocks, blocksKey(2)) }, nil, nil, noKey, noKey},
		{"nor that of request 0", func(o *owner) *Entry { return o.allocate(theBlocks, Key{}) },
			func(o *owner, e *Entry) { o.removeKey(Key{}) }, nil, noKey, noKey},
		{"a second key is lost", func(o *owner) *Entry { return o.register(theBlocks, k, blocksKey(2)) },
			func(o *owner, e *Entry) { o.register(theBlocks, blocksKey(2)) }, nil, all, all},
		{"the key is taken over", registered, func(o *owner, e *Entry) { o.register(theBlocks, k) }, nil, noKey, noKey},
		{"and over, and not given back", registered, func(o *owner, e *Entry) { o.unregister(o.register(theBlocks, k)) }, nil, noKey, noKey},
		{"rows don't take it over", registered, func(o *owner, e *Entry) { o.register(theRows, k) }, nil, all, all},
		{"another cache's key is taken over", registered,
			func(o *owner, e *Entry) { o.register(theBlocks, blocksKey(2)); o.register(theBlocks, blocksKey(2)) }, nil, all, all},
		{"the key of a registered cache stays", registered, func(o *owner, e *Entry) { o.removeKey(k) }, nil, all, all},
		{"the key is removed", ownedBlocks, func(o *owner, e *Entry) { o.removeKey(k) }, (*owner).unregister, noKey, none},
		{"unregistered", registered, (*owner).unregister, nil, none, none},
		{"deallocated", ownedBlocks, (*owner).deallocate, nil, none, none},
		{"deallocated, with a key left", ownedRows, (*owner).deallocate, func(o *owner, e *Entry) { o.removeKey(key(1)) }, noKey, none},
		{"deallocated, the key left is taken over", ownedRows, (*owner).deallocate,
			func(o *owner, e *Entry) { o.register(theBlocks, key(1)) }, noKey, none},
		{"deallocated, the key left is pulled", ownedRows, (*owner).deallocate,
			func(o *owner, e *Entry) { o.lease(key(1)).Done(everything) }, noKey, none},
		{"deallocated while a copy uses it", ownedBlocks, func(o *owner, e *Entry) { o.uses(e); o.deallocate(e) }, (*owner).release, none, none},
		{"deallocated under a lease", ownedRows, func(o *owner, e *Entry) { o.leases(1); o.deallocate(e); o.removeKey(key(1)) },
			(*owner).release, memory, none},
		{"under two", ownedRows, func(o *owner, e *Entry) { o.leases(2); o.deallocate(e); o.lease(key(1)).Done(everything) },
			(*owner).release, memory, none},
		{"and while a copy uses it", ownedRows, func(o *owner, e *Entry) { o.leases(1); o.uses(e); o.deallocate(e); o.removeKey(key(1)) },
			func(o *owner, e *Entry) { o.held[0]() }, memory, none},
		{"unregistered under a lease", ownedRows, func(o *owner, e *Entry) { o.leases(1); o.unregister(e) }, (*owner).release, none, none},
		{"closed", registered, func(o *owner, e *Entry) { require.NoError(o.t, o.Close()) }, nil, none, none},
		{"closed under a lease", ownedRows,
			func(o *owner, e *Entry) {
				o.leases(1)
				o.deallocate(e)
				o.removeKey(key(1))
				require.NoError(o.t, o.Close())
			},
			(*owner).release, none, none},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			o := twoPools(t)
			e := c.make(o)
			defer o.release(e)
			_, ref := o.find(e)
			step := func(do func(*owner, *Entry), want names) {
				if do != nil {
					do(o, e)
				}
				require.Equal(t, want, namesIn(o.pages, ref), "for a peer on this host")
				require.Equal(t, want, namesIn(o.Directory(), ref), "in this process")
				require.Equal(t, want.live, o.found(e.Generation))
			}
			step(c.do, c.done)
			step(c.end, c.ended)
		})
	}
}

func TestTheSlotOfAWithdrawnCacheIsItsSuccessors(t *testing.T) {
	o := twoPools(t)
	old := o.allocate(rows(1, 1, 4))
	_, ref := o.find(old)
	o.uses(old)
	o.deallocate(old)
	for {
		e := o.register(rows(1, 1, 4))
		if _, next := o.find(e); next.Slot == ref.Slot {
			o.release(old)
			require.True(t, o.pages.Live(next), "the last use of another cache has ended")
			return
		}
		o.unregister(e)
	}
}

func TestTheLastHoldEndsBesideTheEndOfTheDirectory(t *testing.T) {
	o := twoPools(t)
	e := o.allocate(rows(1, 1, 4), key(1))
	o.leases(2)
	o.deallocate(e)
	o.removeKey(key(1))
	var holder sync.WaitGroup
	require.NoError(t, o.Close())
	holder.Go(func() { o.release(e) })
	require.NoError(t, o.publisher.Close())
	holder.Wait()
}

// TestBothDirectoriesAgree walks at random, and asks about every generation there ever was.
func TestBothDirectoriesAgree(t *testing.T) {
	for seed := range uint64(5) {
		o := twoPools(t)
		random := rand.New(rand.NewPCG(seed, 0))
		keys := []Key{key(1), key(2), prefix(1), blocksKey(1), blocksKey(2)}
		var entries []*Entry
		var refs []directory.Ref
		var sources []*Source
		for range 300 {
			desc := rows(2, 2, 4)
			if random.IntN(2) == 0 {
				desc.Kind = plan.Blocks
			}
			desc.Placement = Placement(random.IntN(2))
			k := keys[random.IntN(len(keys))]
			var e *Entry
			switch random.IntN(8) {
			case 0:
				e = o.register(desc, k)
			case 1, 2:
				e, _ = o.Allocate(desc, []Key{k})
			case 3:
				_ = o.RemoveKey(k)
			case 4:
				if len(entries) > 0 {
					any := entries[random.IntN(len(entries))]
					_ = o.Deallocate(any.ID, any.Shape.Kind == plan.Blocks)
				}
			case 5:
				if len(entries) > 0 && random.IntN(4) == 0 {
					o.unregister(entries[random.IntN(len(entries))])
				}
			case 6:
				if s, err := o.Open(byKey(k)); err == nil {
					sources = append(sources, s)
				}
			case 7:
				if len(sources) > 0 {
					i := random.IntN(len(sources))
					sources[i].Done(plan.Range{All: true})
					sources = slices.Delete(sources, i, i+1)
				}
			}
			if e != nil {
				_, ref := o.find(e)
				entries, refs = append(entries, e), append(refs, ref)
			}
			for _, ref := range refs {
				here, there := namesIn(o.Directory(), ref), namesIn(o.pages, ref)
				if _, found := o.Directory().Lookup(ref.Generation); here != there || found != there.live {
					require.FailNow(t, "they differ", "in this process %v, for a peer %v", here, there)
				}
			}
		}
		for _, s := range sources {
			s.Drop()
		}
	}
}

// TestAGenerationEndsInTheDirectoryBeforeItsMemoryGoes looks at the directory when memory is about to be given back.
func TestAGenerationEndsInTheDirectoryBeforeItsMemoryGoes(t *testing.T) {
	everything := plan.Range{All: true}
	for name, end := range map[string]func(o *owner, e *Entry){
		"deallocated":     func(o *owner, e *Entry) { o.removeKey(key(1)); o.deallocate(e) },
		"last key gone":   func(o *owner, e *Entry) { o.deallocate(e); o.removeKey(key(1)) },
		"last key taken":  func(o *owner, e *Entry) { o.deallocate(e); o.register(blocks(1, 1, 4), key(1)) },
		"unregistered":    (*owner).unregister,
		"pulled":          func(o *owner, e *Entry) { o.deallocate(e); o.lease(key(1)).Done(everything) },
		"last lease gone": func(o *owner, e *Entry) { o.leases(2); o.deallocate(e); o.removeKey(key(1)); o.release(e) },
		"last use gone":   func(o *owner, e *Entry) { o.uses(e); o.deallocate(e); o.removeKey(key(1)); o.release(e) },
		"last system call ended": func(o *owner, e *Entry) {
			lease := o.lease(key(1))
			o.deallocate(e)
			o.removeKey(key(1))
			require.True(o.t, lease.Acquire())
			lease.Drop()
			lease.Release()
		},
		"closed": func(o *owner, e *Entry) { require.NoError(o.t, o.Close()) },
		"closed under a lease": func(o *owner, e *Entry) {
			o.leases(1)
			require.NoError(o.t, o.Close())
			require.NoError(o.t, o.publisher.Close(), "which the last hold must not write into")
			o.release(e)
		},
	} {
		t.Run(name, func(t *testing.T) {
			o := twoPools(t)
			e := o.allocate(rows(1, 1, testPool), key(1))
			_, ref := o.find(e)
			pool := o.Table.pools[Device]
			memory, looks := pool.memory, 0
			look := func() {
				looks++
				require.False(t, o.pages.Live(ref))
				require.False(t, o.found(e.Generation))
			}
			pool.memory = &watchedMemory{memory, &watched{discard: look, closed: look}}
			end(o, e)
			pool.memory = memory
			require.NotZero(t, looks)
		})
	}
}

// TestAPeerNeverTakesBytesOfOneGenerationForAnothers reads pool memory, through a mapping of the peer's, while owners write into what they
// have allocated, free it, and get it again.
func TestAPeerNeverTakesBytesOfOneGenerationForAnothers(t *testing.T) {
	o := twoPools(t)
	rounds := 1500
	if testing.Short() {
		rounds = 300
	}
	const bytes = 4096 // of a tensor, the first of its page
	pattern := func(generation uint64) byte { return byte(1 + generation%251) }
	var newest atomic.Uint64
	var whole atomic.Int64            // caches that peers have read
	const patience = 30 * time.Second // for peers that the scheduler has not let in yet
	goOn := func(round int, since time.Time) bool {
		return round < rounds || whole.Load() == 0 && time.Since(since) < patience
	}
	var owners, peers sync.WaitGroup
	for worker := range uint64(2) {
		owners.Go(func() {
			random := rand.New(rand.NewPCG(worker, 1))
			for round, since := 0, time.Now(); goOn(round, since); round++ {
				k := key(random.Uint64N(4))
				switch random.IntN(4) {
				case 0:
					_ = o.RemoveKey(k)
				case 1:
					if s, err := o.Open(byKey(k)); err == nil {
						s.Done(plan.Range{All: true})
					}
				default:
					e, err := o.Allocate(rows(1+random.Uint32N(3), 1, bytes), []Key{k})
					if err != nil {
						continue
					}
					for _, addr := range e.Addrs {
						for i := range mem.View(addr, bytes) {
							mem.View(addr, bytes)[i] = pattern(e.Generation)
						}
					}
					newest.Store(e.Generation)
					if random.IntN(2) == 0 {
						runtime.Gosched()
					}
					_ = o.Deallocate(e.ID, false) // its key keeps it
				}
			}
		})
	}
	var done atomic.Bool
	for reader := range uint64(2) {
		peers.Go(func() {
			random := rand.New(rand.NewPCG(reader, 2))
			for !done.Load() {
				last := newest.Load()
				r, ref, ok := o.pages.Find(last + 1 - random.Uint64N(min(last, 8)+1))
				if !ok {
					runtime.Gosched()
					continue
				}
				pool := o.pools[r.Pool-1]
				written, others := true, false // what was not written yet is 0
				for _, offset := range r.Addrs {
					for _, value := range mem.View(pool.Addr()+offset, bytes) {
						written = written && value == pattern(r.Generation)
						others = others || value != 0 && value != pattern(r.Generation)
					}
				}
				switch live := o.pages.Live(ref); {
				case live && others:
					panic("bytes of another generation")
				case live && written:
					whole.Add(1)
				}
			}
		})
	}
	owners.Wait()
	done.Store(true)
	peers.Wait()
	require.NotZero(t, whole.Load(), "peers that never read anything have tested nothing")
	for id := range uint64(4) {
		o.removeKey(key(id))
	}
	require.Zero(t, o.Stats().Entries)
	for generation := range newest.Load() + 1 {
		require.False(t, o.found(generation))
	}
}

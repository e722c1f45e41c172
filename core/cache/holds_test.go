// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"context"
	"math/rand/v2"
	"runtime"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/plan"
	"github.com/llm-datadist-open/llm-datadist/core/status"
)

func TestALeaseKeepsTheMemory(t *testing.T) {
	for _, c := range []struct {
		name string
		end  func(*Source)
	}{{"done", func(s *Source) { s.Done(all) }}, {"dropped", (*Source).Drop}} {
		t.Run(c.name, func(t *testing.T) {
			table := newTable(t)
			e, err := table.Allocate(rows(1, 1, 4), []Key{key(1)})
			require.NoError(t, err)
			lease, err := table.Open(byKey(key(1)))
			require.NoError(t, err)
			plain, err := table.Open(Lookup{Key: key(1), OneSided: true})
			require.NoError(t, err)
			require.NoError(t, table.Deallocate(e.ID, false))
			require.True(t, plain.Acquire(), "its key still keeps it")
			plain.Release()
			require.NoError(t, table.RemoveKey(key(1)))
			require.False(t, table.Live(e.Generation))
			require.False(t, plain.Acquire(), "withdrawn")
			require.True(t, lease.Acquire())
			lease.Release()
			require.True(t, lease.Acquire(), "time and again")
			require.Equal(t, Stats{Retiring: 1, Leases: 1, PoolBytes: 1 << 16, Drawn: 1}, table.Stats())
			_, err = table.Use(e.ID)
			require.ErrorIs(t, err, status.CacheNotExist)
			c.end(lease)
			require.NotZero(t, table.Stats().PoolBytes, "a system call is under way")
			lease.Release()
			plain.Drop()
			requireFree(t, table)
		})
	}
}

func TestALeaseThatHasEndedOpensNothing(t *testing.T) {
	var h holds
	h.add(oneLease)
	require.Zero(t, h.set(withdrawn)&withdrawn)
	require.True(t, h.enter(true))
	last, _ := h.leave(oneLease)
	require.False(t, last)
	require.False(t, h.enter(true), "not even while its last system call is under way")
	last, _ = h.leave(oneBusy)
	require.True(t, last)
}

func TestDeallocateNeverWaits(t *testing.T) {
	table := newTable(t)
	e, err := table.Allocate(rows(1, 1, 4), nil)
	require.NoError(t, err)
	use, err := table.Use(e.ID)
	require.NoError(t, err)
	s, err := table.Open(byID(e.ID, 0))
	require.NoError(t, err)
	require.True(t, s.Acquire())
	require.NoError(t, table.Deallocate(e.ID, false))
	require.False(t, s.Acquire())
	_, err = table.Allocate(rows(1, 1, testPool), nil)
	require.ErrorIs(t, err, status.OutOfMemory, "the memory is still held")
	s.Release()
	s.Drop()
	require.NotZero(t, table.Stats().PoolBytes)
	use.Release()
	use.Release()
	requireFree(t, table)
	whole, err := table.Allocate(rows(1, 1, testPool), nil)
	require.NoError(t, err)
	require.Equal(t, e.Addrs, whole.Addrs)
}

func TestUnregisterWaitsForWhatIsUnderWay(t *testing.T) {
	for name, make := range map[string]func(*Table) (*Entry, error){
		"registered": func(table *Table) (*Entry, error) {
			return table.Register(rows(1, 1, 4), []uintptr{1}, []Key{key(1)}, true)
		},
		"allocated": func(table *Table) (*Entry, error) { return table.Allocate(rows(1, 1, 4), []Key{key(1)}) },
	} {
		t.Run(name, func(t *testing.T) {
			table := newTable(t)
			synctest.Test(t, func(t *testing.T) {
				e, err := make(table)
				require.NoError(t, err)
				use, err := table.Use(e.ID)
				require.NoError(t, err)
				s, err := table.Open(byKey(key(1)))
				require.NoError(t, err)
				require.True(t, s.Acquire())
				var returned error
				done := false
				go func() {
					ctx, cancel := context.WithTimeout(context.Background(), time.Hour)
					defer cancel()
					returned = table.Unregister(ctx, e.ID)
					done = true
				}()
				synctest.Wait()
				require.False(t, done)
				require.False(t, table.Live(e.Generation), "withdrawn at once")
				require.False(t, s.Acquire(), "under a lease neither")
				_, err = table.Open(byKey(key(1)))
				require.ErrorIs(t, err, status.CacheNotExist)
				require.NoError(t, table.Unregister(t.Context(), e.ID), "unknown now")
				s.Release()
				synctest.Wait()
				require.False(t, done)
				use.Release()
				synctest.Wait()
				require.True(t, done, "open sources are not waited for")
				require.NoError(t, returned)
				if s.Consumes() {
					require.NotZero(t, table.Stats().PoolBytes, "a lease keeps the memory, no more")
				}
				s.Done(all)
				requireFree(t, table)
			})
		})
	}
}

func TestUnregisterGivesUpWithItsContext(t *testing.T) {
	table := newTable(t)
	synctest.Test(t, func(t *testing.T) {
		e, err := table.Register(rows(1, 1, 4), []uintptr{1}, nil, true)
		require.NoError(t, err)
		use, err := table.Use(e.ID)
		require.NoError(t, err)
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		begin := time.Now()
		err = table.Unregister(ctx, e.ID)
		require.ErrorIs(t, err, status.Timeout)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.Equal(t, time.Minute, time.Since(begin))
		require.False(t, table.Live(e.Generation))
		require.Equal(t, Stats{Retiring: 1, Uses: 1, Drawn: 1}, table.Stats())
		use.Release()
		requireFree(t, table)

		cancelled, cancel := context.WithCancel(context.Background())
		cancel()
		e, err = table.Register(rows(1, 1, 4), []uintptr{1}, nil, true)
		require.NoError(t, err)
		require.NoError(t, table.Unregister(cancelled, e.ID), "nothing to wait for is success whatever ctx says")
	})
}

func TestCloseLeavesTheMemoryToWhoHoldsIt(t *testing.T) {
	config := &PoolConfig{Bytes: testPool, PageShift: 16}
	table, err := NewTable(mem.Host(), config, nil)
	require.NoError(t, err)
	leased, err := table.Allocate(rows(1, 1, 4), []Key{key(1)})
	require.NoError(t, err)
	lease, err := table.Open(byKey(key(1)))
	require.NoError(t, err)
	require.NoError(t, table.Deallocate(leased.ID, false))
	require.NoError(t, table.RemoveKey(key(1))) // withdrawn before Close, and kept by the lease
	busy, err := table.Allocate(rows(1, 1, 4), []Key{key(2)})
	require.NoError(t, err)
	use, err := table.Use(busy.ID)
	require.NoError(t, err)
	_, err = table.Register(rows(1, 1, 4), []uintptr{1}, nil, true)
	require.NoError(t, err)

	require.NoError(t, table.Close())
	require.NoError(t, table.Close())
	require.False(t, lease.Acquire(), "revoked")
	require.Equal(t, Stats{Retiring: 2, Uses: 1, Leases: 1, PoolBytes: 2 << 16, Drawn: 3}, table.Stats())
	mem.View(busy.Addrs[0], 4)[0] = 1 // still mapped
	use.Release()
	mem.View(leased.Addrs[0], 4)[0] = 1
	lease.Done(all)
	requireFree(t, table)
	require.Error(t, table.pools[Device].memory.Discard(0, 1), "closed by the last hold")

	_, err = table.Allocate(rows(1, 1, 4), nil)
	require.ErrorIs(t, err, status.ParamInvalid)
	_, err = table.Register(rows(1, 1, 4), []uintptr{1}, nil, true)
	require.ErrorIs(t, err, status.ParamInvalid)
	_, err = table.Use(1)
	require.ErrorIs(t, err, status.ParamInvalid)
	_, err = table.Open(byID(1, 0))
	require.ErrorIs(t, err, status.ParamInvalid)
	require.ErrorIs(t, table.Unregister(t.Context(), 1), status.ParamInvalid)
	require.ErrorIs(t, table.Deallocate(1, false), status.ParamInvalid)
	require.ErrorIs(t, table.RemoveKey(key(1)), status.ParamInvalid)
	require.False(t, table.Live(busy.Generation))
}

// watched is a device that calls back before it discards and, where that is set, before it closes a reservation.
type watched struct {
	mem.Device
	discard, closed func()
}

func (w *watched) Reserve(bytes uint64) (mem.Memory, error) {
	memory, err := w.Device.Reserve(bytes)
	return &watchedMemory{memory, w}, err
}

type watchedMemory struct {
	mem.Memory
	device *watched
}

func (m *watchedMemory) Discard(offset, bytes uint64) error {
	m.device.discard()
	return m.Memory.Discard(offset, bytes)
}

func (m *watchedMemory) Close() error {
	if m.device.closed != nil {
		m.device.closed()
	}
	return m.Memory.Close()
}

func TestPagesAreUsedAgainOnlyAfterTheyWereGivenBack(t *testing.T) {
	device := &watched{Device: mem.Host(), discard: func() {}}
	table, err := NewTable(device, &PoolConfig{Bytes: testPool, PageShift: 16}, nil)
	require.NoError(t, err)
	e, err := table.Allocate(rows(4, 1, testPool/4), nil)
	require.NoError(t, err)
	calls := 0
	device.discard = func() {
		calls++
		_, err := table.Allocate(rows(1, 1, 1), nil) // also: the table isn't locked
		require.ErrorIs(t, err, status.OutOfMemory, "a hole would be punched into this cache")
	}
	require.NoError(t, table.Deallocate(e.ID, false))
	require.Equal(t, 1, calls, "one hole for four tensors side by side")
	requireFree(t, table)
	require.NoError(t, table.Close())
}

func TestHoldsFromManyGoroutines(t *testing.T) {
	table := newTable(t)
	registered, err := table.Register(rows(2, 1, 4), make16(2), nil, true)
	require.NoError(t, err)
	const goroutines, rounds = 16, 300
	var workers sync.WaitGroup
	for worker := range uint64(goroutines) {
		workers.Go(func() {
			random := rand.New(rand.NewPCG(worker, 0))
			held, err := table.Use(registered.ID) // one hold at a time, each until the next
			if err != nil {
				panic(err)
			}
			defer func() { held.Release() }()
			for range rounds {
				k := key(random.Uint64N(4))
				switch random.IntN(6) {
				case 0, 1:
					e, err := table.Allocate(rows(2, 1, 1+random.Int64N(1<<17)), []Key{k})
					if err != nil {
						continue
					}
					mem.View(e.Addrs[1], 1)[0] = byte(worker)
					if random.IntN(2) == 0 {
						use, err := table.Use(e.ID)
						if err == nil {
							held.Release()
							held = use
						}
					}
					_ = table.Deallocate(e.ID, false)
				case 2:
					_ = table.RemoveKey(k)
				case 3:
					s, err := table.Open(byID(registered.ID, 0))
					if err == nil && s.Acquire() {
						s.Release()
						s.Done(all)
					}
				default:
					s, err := table.Open(byKey(k))
					if err != nil {
						continue
					}
					for range 3 {
						if !s.Acquire() {
							panic("a lease was withdrawn")
						}
						_ = mem.View(s.Entry().Addrs[0], 1)[0] // mapped, or the test dies
						runtime.Gosched()
						s.Release()
					}
					switch random.IntN(3) {
					case 0:
						s.Drop()
					case 1:
						s.Done(plan.Range{First: uint32(random.IntN(2)), Count: 1})
					default:
						s.Done(all)
					}
				}
			}
		})
	}
	workers.Wait()
	for id := range uint64(4) {
		require.NoError(t, table.RemoveKey(key(id)))
	}
	require.NoError(t, table.Unregister(t.Context(), registered.ID))
	requireFree(t, table)
}

func TestCloseAmongManyOperations(t *testing.T) {
	for seed := range uint64(20) {
		table, err := NewTable(mem.Host(), &PoolConfig{Bytes: testPool, PageShift: 16}, nil)
		require.NoError(t, err)
		var workers sync.WaitGroup
		for worker := range uint64(8) {
			workers.Go(func() {
				random := rand.New(rand.NewPCG(seed, worker))
				for {
					k := key(random.Uint64N(4))
					e, err := table.Allocate(rows(1, 1, 1), []Key{k})
					if status.CodeOf(err) == status.ParamInvalid && isClosed(table) {
						return
					}
					if e != nil && random.IntN(2) == 0 {
						_ = table.Unregister(t.Context(), e.ID)
					}
					s, err := table.Open(byKey(k))
					if err != nil {
						continue
					}
					if s.Acquire() {
						_ = mem.View(s.Entry().Addrs[0], 1)[0] // mapped, or the test dies
						s.Release()
					}
					s.Done(all)
				}
			})
		}
		for range seed * 50 {
			runtime.Gosched()
		}
		require.NoError(t, table.Close())
		workers.Wait()
		requireNothingLeft(t, table)
	}
}

func isClosed(table *Table) bool {
	return status.CodeOf(table.RemoveKey(key(99))) == status.ParamInvalid
}

func TestUnregisterAmongManyReaders(t *testing.T) {
	table := newTable(t)
	for range 200 {
		e, err := table.Register(rows(1, 1, 4), []uintptr{1}, nil, true)
		require.NoError(t, err)
		var readers sync.WaitGroup
		var reading [4]bool // written only while the memory is acquired, so never at the same time as the read below
		for i := range reading {
			s, err := table.Open(byID(e.ID, 0))
			require.NoError(t, err)
			readers.Go(func() {
				defer s.Drop()
				for s.Acquire() {
					reading[i] = !reading[i]
					s.Release()
				}
			})
		}
		runtime.Gosched()
		require.NoError(t, table.Unregister(t.Context(), e.ID))
		_ = reading // the race detector sees a reader that is still inside
		for i := range reading {
			reading[i] = true
		}
		readers.Wait()
	}
	requireFree(t, table)
}

func TestAcquireAllocatesNothing(t *testing.T) {
	table := newTable(t)
	e, err := table.Allocate(rows(1, 1, 4), nil)
	require.NoError(t, err)
	s, err := table.Open(byID(e.ID, 0))
	require.NoError(t, err)
	require.Zero(t, testing.AllocsPerRun(100, func() {
		if s.Acquire() {
			s.Release()
		}
	}))
	s.Drop()
}

func BenchmarkAcquire(b *testing.B) {
	table := newTable(b)
	e, err := table.Allocate(rows(1, 1, 4), nil)
	require.NoError(b, err)
	s, err := table.Open(byID(e.ID, 0))
	require.NoError(b, err)
	for b.Loop() {
		if s.Acquire() {
			s.Release()
		}
	}
}

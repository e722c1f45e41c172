// SPDX-License-Identifier: Apache-2.0

package cache

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/llm-datadist-open/llm-datadist/core/plan"
	"github.com/llm-datadist-open/llm-datadist/core/status"
)

var all = plan.Range{All: true}

func TestAllocateKeys(t *testing.T) {
	none, noPrefix := Key{ID: NoID}, Key{ID: NoID, Prefix: true}
	cases := []struct {
		name  string
		desc  Desc
		keys  []Key
		ok    bool
		bound map[Key]uint64
	}{
		{"no keys", rows(1, 2, 4), nil, true, nil},
		{"fewer than rows", rows(1, 2, 4), []Key{key(1)}, true, map[Key]uint64{key(1): 0}},
		{"as many as rows", rows(1, 2, 4), []Key{key(1), prefix(2)}, true, map[Key]uint64{key(1): 0, prefix(2): 1}},
		{"more than rows", rows(1, 2, 4), []Key{key(1), key(2), key(3)}, false, nil},
		{"more than rows, placeholders", rows(1, 1, 4), []Key{none, none}, false, nil},
		{"placeholder takes a row", rows(1, 3, 4), []Key{none, key(1), noPrefix}, true, map[Key]uint64{key(1): 1}},
		{"repeated placeholders", rows(1, 3, 4), []Key{none, none, key(1)}, true, map[Key]uint64{key(1): 2}},
		{"a key twice", rows(1, 3, 4), []Key{key(1), key(2), key(1)}, false, nil},
		{"full keys differ", rows(1, 3, 4), []Key{{ID: 1}, {ID: 1, Model: 1}, {ID: 1, Prefix: true}}, true,
			map[Key]uint64{{ID: 1}: 0, {ID: 1, Model: 1}: 1, {ID: 1, Prefix: true}: 2}},
		{"in use", rows(1, 1, 4), []Key{key(100)}, false, nil},
		{"in use by a registered cache", rows(1, 1, 4), []Key{key(101)}, false, nil},
		{"another model", rows(1, 1, 4), []Key{{ID: 100, Model: 1}}, true, map[Key]uint64{{ID: 100, Model: 1}: 0}},
		{"blocks key", blocks(1, 2, 4), []Key{{ID: NoID, Model: 3}}, true, map[Key]uint64{{ID: NoID, Model: 3}: 0}},
		{"blocks key in use", blocks(1, 2, 4), []Key{{ID: NoID, Model: 9}}, false, nil},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			table := newTable(t)
			_, err := table.Allocate(rows(1, 1, 4), []Key{key(100)})
			require.NoError(t, err)
			_, err = table.Register(rows(1, 1, 4), []uintptr{1}, []Key{key(101)}, true)
			require.NoError(t, err)
			_, err = table.Allocate(blocks(1, 1, 4), []Key{{ID: NoID, Model: 9}})
			require.NoError(t, err)
			before := table.Stats()
			e, err := table.Allocate(c.desc, c.keys)
			if !c.ok {
				require.ErrorIs(t, err, status.ParamInvalid)
				after := table.Stats()
				after.Drawn--
				require.Equal(t, before, after, "memory returned, no key bound")
				return
			}
			require.NoError(t, err)
			require.Len(t, c.bound, table.Stats().Keys-before.Keys)
			for k, batch := range c.bound {
				s, err := table.Open(byKey(k))
				require.NoError(t, err)
				require.Same(t, e, s.Entry())
				require.Equal(t, batch, s.Batch())
				s.Drop()
			}
		})
	}
}

func TestRegisterKeys(t *testing.T) {
	open := func(t *testing.T, table *Table, k Key) *Source {
		s, err := table.Open(byKey(k))
		require.NoError(t, err)
		t.Cleanup(s.Drop)
		return s
	}
	t.Run("an old mapping stays", func(t *testing.T) {
		table := newTable(t)
		old, err := table.Allocate(rows(1, 2, 4), []Key{key(1)})
		require.NoError(t, err)
		e, err := table.Register(rows(1, 2, 4), []uintptr{1}, []Key{key(1), key(2)}, true)
		require.NoError(t, err)
		require.Same(t, old, open(t, table, key(1)).Entry())
		require.Same(t, e, open(t, table, key(2)).Entry())
		s, err := table.Open(byID(e.ID, 0))
		require.NoError(t, err)
		require.Same(t, e, s.Entry(), "by id it is the cache that was named")
		require.False(t, s.Consumes())
		require.NoError(t, table.Unregister(t.Context(), e.ID))
		require.Same(t, old, open(t, table, key(1)).Entry(), "the old mapping survives the other cache")
	})
	t.Run("a blocks cache takes the key over", func(t *testing.T) {
		table := newTable(t)
		k := Key{ID: NoID, Model: 1}
		old, err := table.Register(blocks(1, 2, 4), []uintptr{1}, []Key{k}, true)
		require.NoError(t, err)
		e, err := table.Register(blocks(1, 2, 4), []uintptr{2}, []Key{k}, true)
		require.NoError(t, err)
		require.Same(t, e, open(t, table, k).Entry())
		require.NoError(t, table.Unregister(t.Context(), old.ID))
		require.Same(t, e, open(t, table, k).Entry())
		require.Equal(t, 1, table.Stats().Keys)
	})
	t.Run("taking the last key of a deallocated cache frees it", func(t *testing.T) {
		table := newTable(t)
		old, err := table.Allocate(rows(1, 2, 4), []Key{key(1)})
		require.NoError(t, err)
		require.NoError(t, table.Deallocate(old.ID, false))
		require.True(t, table.Live(old.Generation))
		e, err := table.Register(blocks(1, 2, 4), []uintptr{2}, []Key{key(1)}, true)
		require.NoError(t, err)
		require.False(t, table.Live(old.Generation))
		require.Zero(t, table.Stats().PoolBytes)
		require.Same(t, e, open(t, table, key(1)).Entry())
	})
	t.Run("a key twice is its last row", func(t *testing.T) {
		table := newTable(t)
		_, err := table.Register(rows(1, 3, 4), []uintptr{1}, []Key{key(1), key(2), key(1)}, true)
		require.NoError(t, err)
		require.EqualValues(t, 2, open(t, table, key(1)).Batch())
		require.EqualValues(t, 1, open(t, table, key(2)).Batch())
	})
	t.Run("more keys than rows are accepted and lead nowhere", func(t *testing.T) {
		table := newTable(t)
		_, err := table.Register(rows(1, 1, 4), []uintptr{1}, []Key{key(1), key(2)}, true)
		require.NoError(t, err)
		require.EqualValues(t, 0, open(t, table, key(1)).Batch())
		_, err = table.Open(byKey(key(2)))
		require.ErrorIs(t, err, status.CacheNotExist)
	})
	t.Run("placeholders", func(t *testing.T) {
		table := newTable(t)
		_, err := table.Register(rows(1, 2, 4), []uintptr{1}, []Key{{ID: NoID}, key(2)}, true)
		require.NoError(t, err)
		require.EqualValues(t, 1, open(t, table, key(2)).Batch())
		require.Equal(t, 1, table.Stats().Keys)
	})
}

func TestRemoveKeyAndDeallocate(t *testing.T) {
	table := newTable(t)
	require.NoError(t, table.RemoveKey(key(1)), "unknown")
	require.NoError(t, table.Deallocate(-1, false), "unknown")
	require.NoError(t, table.Deallocate(77, true), "unknown")

	registered, err := table.Register(rows(1, 1, 4), []uintptr{1}, []Key{key(50)}, true)
	require.NoError(t, err)
	require.NoError(t, table.RemoveKey(key(50)))
	require.NoError(t, table.Deallocate(registered.ID, false))
	require.NoError(t, table.Deallocate(registered.ID, true))
	s, err := table.Open(byKey(key(50)))
	require.NoError(t, err, "registered caches keep their keys")
	s.Drop()

	e, err := table.Allocate(rows(1, 2, 4), []Key{key(1), prefix(2)})
	require.NoError(t, err)
	require.ErrorIs(t, table.Deallocate(e.ID, true), status.ParamInvalid, "the wrong kind")
	require.NoError(t, table.Deallocate(e.ID, false))
	require.NoError(t, table.Deallocate(e.ID, false), "twice is fine")
	for _, l := range []Lookup{byKey(key(1)), byKey(prefix(2)), byID(e.ID, 1)} {
		s, err := table.Open(l)
		require.NoError(t, err, "it still answers")
		require.True(t, s.Acquire())
		s.Release()
		s.Drop()
	}
	use, err := table.Use(e.ID)
	require.NoError(t, err, "also for copies by id")
	use.Release()
	require.NoError(t, table.RemoveKey(key(1)))
	require.True(t, table.Live(e.Generation))
	require.NoError(t, table.RemoveKey(prefix(2)))
	require.False(t, table.Live(e.Generation), "its last key was all that kept it")
	require.Zero(t, table.Stats().PoolBytes)

	e, err = table.Allocate(rows(1, 2, 4), []Key{key(1)})
	require.NoError(t, err)
	require.NoError(t, table.RemoveKey(key(1)))
	require.True(t, table.Live(e.Generation), "the owner has not let go")
	require.NoError(t, table.Deallocate(e.ID, false))
	require.Zero(t, table.Stats().PoolBytes)

	b, err := table.Allocate(blocks(1, 2, 4), []Key{{ID: NoID}})
	require.NoError(t, err)
	require.NoError(t, table.Deallocate(b.ID, true))
	require.False(t, table.Live(b.Generation), "a blocks cache is freed at once, with its key")
	require.Equal(t, Stats{Entries: 1, Keys: 1, Drawn: 4}, table.Stats())
	_, err = table.Open(byKey(Key{ID: NoID}))
	require.ErrorIs(t, err, status.CacheNotExist)
}

func TestOpen(t *testing.T) {
	table := newTable(t)
	register := func(desc Desc, accessible bool, keys ...Key) int64 {
		e, err := table.Register(desc, make16(desc.Tensors), keys, accessible)
		require.NoError(t, err)
		return e.ID
	}
	allocate := func(desc Desc, keys ...Key) int64 {
		e, err := table.Allocate(desc, keys)
		require.NoError(t, err)
		return e.ID
	}
	owned := allocate(rows(1, 3, 4), key(0), key(11), prefix(12))
	ownedBlocks := allocate(blocks(1, 4, 4), Key{ID: NoID})
	mine := register(rows(1, 2, 4), true, key(20), key(21))
	hidden := register(rows(1, 2, 4), false, key(30))
	model7 := register(blocks(1, 4, 4), true, Key{ID: NoID, Model: 7})
	wrapping, err := table.Register(rows(1, 1, 64), []uintptr{^uintptr(0) - 8}, nil, true)
	require.NoError(t, err)

	oneSided := func(l Lookup) Lookup { l.OneSided = true; return l }
	exactly := func(id int64, batch uint64, step int64) Lookup {
		l := byID(id, batch)
		l.Generation = uint64(int64(table.live[id].Generation) + step)
		return l
	}
	fallback := func(k Key, id int64, batch uint64) Lookup {
		return Lookup{Key: k, ByID: true, CacheID: id, Batch: batch, OneSided: true}
	}
	const missing, denied = status.CacheNotExist, status.ParamInvalid
	cases := []struct {
		name     string
		lookup   Lookup
		code     status.Code
		id       int64
		batch    uint64
		consumes bool
	}{
		{"key", byKey(key(11)), 0, owned, 1, true},
		{"unknown key", byKey(key(99)), missing, 0, 0, false},
		{"key of another model", byKey(Key{ID: 11, Model: 1}), missing, 0, 0, false},
		{"prefix key is not consumed", byKey(prefix(12)), 0, owned, 2, false},
		{"prefix is not normal", byKey(prefix(11)), missing, 0, 0, false},
		{"normal is not prefix", byKey(key(12)), missing, 0, 0, false},
		{"blocks key", Lookup{Key: Key{ID: NoID}, BlocksToBlocks: true}, 0, ownedBlocks, 0, false},
		{"blocks key, asked for rows", byKey(Key{ID: NoID}), 0, ownedBlocks, 0, false},
		{"key, blocks to blocks", Lookup{Key: key(11), BlocksToBlocks: true}, 0, owned, 1, false},
		{"registered key is not consumed", byKey(key(21)), 0, mine, 1, false},
		{"not accessible matters in one-sided mode only", byKey(key(30)), 0, hidden, 0, false},
		{"id with a key bound", byID(owned, 1), 0, owned, 1, true},
		{"id with a prefix key bound", byID(owned, 2), 0, owned, 2, false},
		{"id, row beyond", byID(owned, 3), missing, 0, 0, false},
		{"id, blocks", byID(ownedBlocks, 0), 0, ownedBlocks, 0, false},
		{"id, blocks are one row", byID(ownedBlocks, 1), missing, 0, 0, false},
		{"id, registered", byID(mine, 1), 0, mine, 1, false},
		{"id 0", byID(0, 0), missing, 0, 0, false},
		{"unknown id", byID(99, 0), missing, 0, 0, false},
		{"negative id is the blocks key of model 0", byID(-1, 0), 0, ownedBlocks, 0, false},
		{"beyond the address space", byID(wrapping.ID, 0), denied, 0, 0, false},
		{"a generation, with a key bound", exactly(owned, 1, 0), 0, owned, 1, false},
		{"a generation, row beyond", exactly(owned, 3, 0), missing, 0, 0, false},
		{"a generation, blocks", exactly(ownedBlocks, 0, 0), 0, ownedBlocks, 0, false},
		{"an earlier generation", exactly(mine, 0, -1), missing, 0, 0, false},
		{"a later generation", exactly(mine, 0, 1), missing, 0, 0, false},
		{"one-sided generation", oneSided(exactly(mine, 1, 0)), 0, mine, 1, false},
		{"one-sided generation, not accessible", oneSided(exactly(hidden, 0, 0)), denied, 0, 0, false},

		{"one-sided key, bound row, not consumed", oneSided(byKey(key(11))), 0, owned, 1, false},
		{"one-sided id", oneSided(byID(owned, 1)), 0, owned, 1, false},
		{"one-sided id, row beyond", oneSided(byID(owned, 3)), missing, 0, 0, false},
		{"one-sided unknown id", oneSided(byID(99, 0)), missing, 0, 0, false},
		{"one-sided, not accessible", oneSided(byID(hidden, 0)), denied, 0, 0, false},
		{"one-sided, not accessible, by key", oneSided(byKey(key(30))), denied, 0, 0, false},
		{"one-sided prefix is its model's blocks", oneSided(byKey(Key{ID: 5, Model: 7, Prefix: true})), 0, model7, 0, false},
		{"one-sided prefix without blocks", oneSided(byKey(Key{ID: 12, Model: 1, Prefix: true})), missing, 0, 0, false},
		{"one-sided push to id 0", fallback(Key{}, 0, 2), 0, owned, 2, false},
		{"one-sided pull from id 0", fallback(Key{ID: NoID}, 0, 0), 0, ownedBlocks, 0, false},
		{"one-sided negative id", fallback(Key{ID: NoID}, -5, 0), 0, ownedBlocks, 0, false},
		{"one-sided id 0, row beyond", fallback(Key{}, 0, 3), missing, 0, 0, false},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			s, err := table.Open(c.lookup)
			if c.code != status.Success {
				require.ErrorIs(t, err, c.code)
				require.Equal(t, status.StageLookup, status.From(err, "").Stage)
				return
			}
			require.NoError(t, err)
			defer s.Drop()
			require.Equal(t, c.id, s.Entry().ID)
			require.Equal(t, c.batch, s.Batch())
			require.Equal(t, c.consumes, s.Consumes())
			require.Equal(t, c.consumes, table.Stats().Leases == 1)
		})
	}
}

func make16(tensors uint32) []uintptr {
	addrs := make([]uintptr, tensors)
	for i := range addrs {
		addrs[i] = uintptr(i+1) << 16
	}
	return addrs
}

func TestKeyRelease(t *testing.T) {
	run := func(first, count uint32) plan.Range { return plan.Range{First: first, Count: count} }
	cases := []struct {
		name     string
		lookups  []Lookup     // one pull after the other, of a cache of 70 tensors with key(1), key(2), prefix(3)
		tensors  []plan.Range // what each of them confirms; Count 0: dropped
		released []Key
	}{
		{"all", []Lookup{byKey(key(1))}, []plan.Range{all}, []Key{key(1)}},
		{"by id", []Lookup{byID(1, 1)}, []plan.Range{all}, []Key{key(2)}},
		{"dropped", []Lookup{byKey(key(1))}, []plan.Range{{}}, nil},
		{"prefix", []Lookup{byKey(prefix(3))}, []plan.Range{all}, nil},
		{"prefix by id", []Lookup{byID(1, 2)}, []plan.Range{all}, nil},
		{"one-sided", []Lookup{{Key: key(1), OneSided: true}}, []plan.Range{all}, nil},
		{"some tensors", []Lookup{byKey(key(1))}, []plan.Range{run(0, 69)}, nil},
		{"all tensors in parts", []Lookup{byKey(key(1)), byKey(key(1)), byKey(key(1))}, []plan.Range{run(60, 10), run(0, 30), run(20, 40)}, []Key{key(1)}},
		{"all of them as a range", []Lookup{byKey(key(1))}, []plan.Range{run(0, 70)}, []Key{key(1)}},
		{"some, then all", []Lookup{byKey(key(1)), byKey(key(1))}, []plan.Range{run(3, 1), all}, []Key{key(1)}},
		{"parts of two keys don't add up", []Lookup{byKey(key(1)), byKey(key(2))}, []plan.Range{run(0, 35), run(35, 35)}, nil},
		{"after one key, a part of another", []Lookup{byKey(key(1)), byKey(key(2))}, []plan.Range{all, run(0, 35)}, []Key{key(1)}},
		{"beyond the tensors", []Lookup{byKey(key(1))}, []plan.Range{run(70, ^uint32(0))}, nil},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			config := &PoolConfig{Bytes: 1 << 20, PageShift: 10}
			table, err := NewTable(nil, config, nil)
			require.NoError(t, err)
			t.Cleanup(func() { requireNothingLeft(t, table) })
			keys := []Key{key(1), key(2), prefix(3)}
			e, err := table.Allocate(rows(70, 3, 4), keys)
			require.NoError(t, err)
			for i, l := range c.lookups {
				s, err := table.Open(l)
				require.NoError(t, err)
				if c.tensors[i] == (plan.Range{}) {
					s.Drop()
					s.Done(all) // the first ending counts
				} else {
					s.Done(c.tensors[i])
					s.Done(all)
					s.Drop()
				}
				require.False(t, s.Acquire(), "an ended source acquires nothing")
			}
			for _, k := range keys {
				s, err := table.Open(byKey(k))
				if containsKey(c.released, k) {
					require.ErrorIs(t, err, status.CacheNotExist)
					continue
				}
				require.NoError(t, err)
				s.Drop()
			}
			s, err := table.Open(byID(e.ID, 0))
			require.NoError(t, err, "the owner has not let go")
			s.Drop()
		})
	}
}

func containsKey(keys []Key, k Key) bool {
	for _, other := range keys {
		if other == k {
			return true
		}
	}
	return false
}

func TestOfTwoPullersOfOneKeyBothMaySucceed(t *testing.T) {
	table := newTable(t)
	e, err := table.Allocate(rows(1, 1, 4), []Key{key(1)})
	require.NoError(t, err)
	require.NoError(t, table.Deallocate(e.ID, false))
	a, err := table.Open(byKey(key(1)))
	require.NoError(t, err)
	b, err := table.Open(byKey(key(1)))
	require.NoError(t, err)
	a.Done(all)
	require.False(t, table.Live(e.Generation))
	require.True(t, b.Acquire(), "the other one's lease keeps the memory")
	b.Release()
	require.NotZero(t, table.Stats().PoolBytes)
	b.Done(all)
	require.Zero(t, table.Stats().PoolBytes)
}

func TestAKeyThatWasBoundAnewIsNotReleased(t *testing.T) {
	table := newTable(t)
	_, err := table.Allocate(rows(1, 1, 4), []Key{key(1)})
	require.NoError(t, err)
	s, err := table.Open(byKey(key(1)))
	require.NoError(t, err)
	require.NoError(t, table.RemoveKey(key(1)))
	next, err := table.Allocate(rows(1, 1, 4), []Key{key(1)})
	require.NoError(t, err)
	s.Done(all)
	again, err := table.Open(byKey(key(1)))
	require.NoError(t, err)
	require.Same(t, next, again.Entry())
	again.Drop()
}

func TestARowWhoseKeyWentElsewhereIsPulledPlainly(t *testing.T) {
	table := newTable(t)
	old, err := table.Allocate(rows(1, 1, 4), []Key{key(1)})
	require.NoError(t, err)
	require.NoError(t, table.RemoveKey(key(1)))
	next, err := table.Allocate(rows(1, 1, 4), []Key{key(1)})
	require.NoError(t, err)
	s, err := table.Open(byID(old.ID, 0))
	require.NoError(t, err)
	require.Same(t, old, s.Entry())
	require.False(t, s.Consumes())
	s.Done(all)
	s, err = table.Open(byKey(key(1)))
	require.NoError(t, err, "the other cache keeps its key")
	require.Same(t, next, s.Entry())
	s.Drop()
}

// SPDX-License-Identifier: Apache-2.0

package directory

import (
	"encoding/binary"
	"math"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/llm-datadist-open/llm-datadist/core/mem"
)

// unshared is a directory in memory of this process's, vowed by nobody but true enough.
func unshared() (*Publisher, *Pages) {
	words := make([]atomic.Uint64, pagesWords)
	words[atVowed].Store(1)
	p := new(Publisher)
	p.begin(words, us)
	return p, &Pages{words}
}

func TestAnOwnerThatStoppedInMidWriteIsNotWaitedFor(t *testing.T) {
	p, pages := published(t)
	old, next := record(5, 100), record(6, 200)
	slot := p.Publish(old)
	ref := requireFound(t, pages, old)

	// Stopped in Withdraw.
	p.words[generationsAt+slot].Store(0)
	requireMissing(t, pages, old.Generation)
	require.False(t, pages.Live(ref))
	require.False(t, pages.Named(ref, Name{}))

	// Stopped in Publish, with all of the record, or the half of it, there.
	p.Withdraw(slot)
	first, ok := p.arena.take(200)
	require.True(t, ok)
	p.taken[6], p.used = run{first, 200}, p.used+1
	p.write(6, &next)
	for _, words := range []int{recordWords, recordWords / 2} {
		requireMissing(t, pages, next.Generation)
		require.False(t, pages.Named(Ref{6, 6}, Name{}))
		for i := words / 2; i < words; i++ {
			recordOf(p.words, 6)[i].Store(0)
		}
	}
	p.write(6, &next)
	p.words[generationsAt+6].Store(6)
	requireFound(t, pages, next)
}

func TestARecordThatChangesWhileItIsReadIsNotFound(t *testing.T) {
	p, pages := unshared()
	slot := p.Publish(record(1, 100))
	_, ok := pages.read(Ref{uint32(slot), 2})
	require.False(t, ok, "it has become another one's")
	_, ok = pages.read(Ref{uint32(slot), 1})
	require.True(t, ok)
}

func TestRecordsThatMakeNoSenseAreNotFound(t *testing.T) {
	const tensors = 4
	for name, c := range map[string]struct {
		word   int
		values []uint64
	}{
		"traits": {inTraits, []uint64{0, 3, 4, 0x81, 1 << 9, 1<<9 | 1, 1<<31 | 1, 1<<10 | 2, math.MaxUint64}},
		"run": {inRun, []uint64{
			0, arenaWords + 1, 1<<32 - 1, (arenaWords-tensors+1)<<32 | tensors, arenaWords<<32 | 1, 1<<32 | arenaWords, math.MaxUint64, math.MaxInt64,
		}},
		"bytes":  {inBytes, []uint64{0, 1, 1<<20 - 1, 1<<20 + 1, 1 << 63, math.MaxUint64}},
		"stride": {inStride, []uint64{0, 1, 1<<18 + 1, 1<<62 + 1<<18, math.MaxUint64}},
		"count":  {inCount, []uint64{0, 1, 5, 1<<62 + 4, 1<<46 + 4, math.MaxUint64}},
	} {
		p, pages := unshared()
		p.Publish(record(1, tensors))
		requireFound(t, pages, record(1, tensors))
		for _, value := range c.values {
			recordOf(pages.words, 1)[c.word].Store(value)
			_, _, ok := pages.Find(1)
			require.False(t, ok, "%s %#x", name, value)
		}
	}
	p, pages := unshared()
	p.Publish(record(1, tensors))
	pages.words[arenaAt+2].Store(math.MaxUint64 - 1<<20 + 1)
	_, _, ok := pages.Find(1)
	require.False(t, ok, "beyond the address space")
	pages.words[arenaAt+2].Store(math.MaxUint64 - 1<<20)
	_, _, ok = pages.Find(1)
	require.True(t, ok)
	for _, word := range []uint64{0, 1 << 30, 1<<30 | 77} {
		pages.words[atVowed].Store(word)
		_, _, ok = pages.Find(1)
		require.False(t, ok, "the owner died")
	}
}

// A generation that is in many slots, of which the first makes no sense, costs one look.
func TestOneRecordIsLookedAt(t *testing.T) {
	p, pages := unshared()
	p.Publish(record(1, 1))
	for slot := range uint64(slots) {
		pages.words[generationsAt+slot].Store(1)
	}
	requireFound(t, pages, record(1, 1))
	recordOf(pages.words, 1)[inRun].Store(0)
	_, _, ok := pages.Find(1)
	require.False(t, ok)
}

func TestAnOwnerThatWritesNonsenseAllTheTimeIsRead(t *testing.T) {
	check(t)
	p, pages := unshared()
	for generation := uint64(1); generation <= 100; generation++ {
		p.Publish(record(generation, 10))
	}
	var stop atomic.Bool
	var owner sync.WaitGroup
	owner.Go(func() {
		random := rand.New(rand.NewPCG(1, 1))
		for !stop.Load() {
			slot := random.Uint64N(100)
			switch random.IntN(4) {
			case 0:
				pages.words[generationsAt+slot].Store(random.Uint64N(100))
			case 1:
				recordOf(pages.words, slot)[random.IntN(recordWords)].Store(random.Uint64() >> random.IntN(64))
			case 2:
				pages.words[arenaAt+random.Uint64N(100*64)].Store(random.Uint64())
			default:
				for i := range recordWords { // sound again
					recordOf(pages.words, slot)[i].Store(recordOf(p.words, 100)[i].Load())
				}
			}
		}
	})
	found := 0
	for i := range uint64(3000) {
		r, ref, ok := pages.Find(i % 100)
		if ok {
			requireSound(t, i%100, r, ref)
			found++
		}
		pages.Live(ref)
		pages.Named(ref, Name{ByKey: i%2 == 0, Model: i % 3})
	}
	stop.Store(true)
	owner.Wait()
	require.NotZero(t, found)
}

// FuzzPages lets an owner write any word of its pages.
func FuzzPages(f *testing.F) {
	write := func(area byte, index uint16, value uint64) []byte {
		return binary.LittleEndian.AppendUint64(binary.LittleEndian.AppendUint16([]byte{area}, index), value)
	}
	f.Add([]byte{})
	f.Add(write(0, atDead, 1))
	f.Add(write(0, atVowed, 1<<30))
	f.Add(write(0, atSlots, math.MaxUint64))
	f.Add(append(write(1, 2, 1), write(1, 1, 0)...))
	f.Add(write(2, 8+inTraits, 1<<40|1))
	f.Add(write(2, 8+inRun, (arenaWords-1)<<32|2))
	f.Add(append(write(2, 8+inStride, 1<<33), write(2, 8+inCount, 1<<33)...))
	f.Add(append(write(2, 8+inRun, arenaWords), write(3, 0xffff, math.MaxUint64)...))

	p, pages := unshared()
	for generation := uint64(1); generation <= 3; generation++ {
		p.Publish(record(generation, uint32(generation)))
	}
	sound := make([]uint64, pagesWords)
	for i := range sound {
		sound[i] = pages.words[i].Load()
	}
	f.Fuzz(func(t *testing.T, writes []byte) {
		wanted := []uint64{0, 1, 2, 3, slots + 1}
		var changed []uint64
		for len(writes) >= 11 {
			index, value := uint64(binary.LittleEndian.Uint16(writes[1:])), binary.LittleEndian.Uint64(writes[3:])
			var at uint64
			switch writes[0] % 4 {
			case 0:
				at = index % generationsAt
			case 1:
				at = generationsAt + index%slots
				if len(wanted) < 100 {
					wanted = append(wanted, value)
				}
			case 2:
				at = recordsAt + index%(slots*recordWords)
			default:
				at = arenaAt + index*(arenaWords-1)/0xffff
			}
			pages.words[at].Store(value)
			changed = append(changed, at)
			writes = writes[11:]
		}
		defer func() {
			for _, at := range changed {
				pages.words[at].Store(sound[at])
			}
		}()
		if opened, err := openWords(pages.words, us); err == nil {
			require.NotNil(t, opened)
		}
		for _, generation := range wanted {
			r, ref, ok := pages.Find(generation)
			if ok {
				requireSound(t, generation, r, ref)
				require.True(t, pages.Live(ref))
				require.Equal(t, r.HasKey, pages.Named(ref, Name{ByKey: true, Model: r.Model}))
				require.False(t, pages.Named(ref, Name{ByKey: true, Model: r.Model + 1}))
			}
			for _, slot := range []uint32{0, 1, uint32(generation), uint32(generation >> 32)} {
				live := pages.Live(Ref{slot, generation})
				named := pages.Named(Ref{slot, generation}, Name{})
				require.True(t, live || !named)
			}
		}
	})
}

// cells is memory that generations live in, one after the other, as peers see it.
type cells struct {
	owner *mem.Pages
	peer  *mem.Mapping
}

const (
	cellCount = 16
	cellBytes = 512
)

func newCells(t testing.TB) *cells {
	owner, err := mem.NewPages("llm_datadist test", cellCount*cellBytes)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, owner.Close()) })
	peer, err := mem.MapShared(owner.FD(), cellCount*cellBytes, mem.PagesSeals)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, peer.Close()) })
	return &cells{owner, peer}
}

// fill writes plainly, as an owner's application does.
func (c *cells) fill(cell int, generation uint64) {
	bytes := mem.View(c.owner.Addr()+uintptr(cell*cellBytes), cellBytes)
	for i := 0; i < cellBytes; i += 8 {
		binary.LittleEndian.PutUint64(bytes[i:], generation)
	}
}

// holds reads plainly, as a transport does.
func (c *cells) holds(cell uintptr, generation uint64) bool {
	same := true
	bytes := mem.View(c.peer.Addr()+cell*cellBytes, cellBytes)
	for i := 0; i < cellBytes; i += 8 {
		same = same && binary.LittleEndian.Uint64(bytes[i:]) == generation
	}
	return same
}

func TestManyReadersOfOneBusyOwner(t *testing.T) {
	p, pages := published(t)
	memory := newCells(t)
	rounds := uint64(40_000)
	if testing.Short() {
		rounds = 2000
	}
	tensorsOf := func(generation uint64) uint32 { return 1 + uint32(scatter(generation)%300) }
	recordIn := func(generation uint64, cell int) Record {
		r := record(generation, tensorsOf(generation))
		r.Addrs[0] = uintptr(cell)
		return r
	}
	var newest atomic.Uint64
	var done atomic.Bool
	var hits [4]int
	var readers sync.WaitGroup
	for reader := range hits {
		readers.Go(func() {
			random := rand.New(rand.NewPCG(uint64(reader), 0))
			for !done.Load() {
				last := newest.Load()
				generation := last + 1 - random.Uint64N(min(last, 20)+1)
				r, ref, ok := pages.Find(generation)
				if !ok {
					runtime.Gosched() // where there are more readers than cores the owner has to come forward
					continue
				}
				cell := r.Addrs[0]
				if cell >= cellCount {
					panic("no cell")
				}
				want := recordIn(generation, int(cell))
				if want.HasKey && !r.HasKey {
					want.HasKey = false // it may have been lost
				}
				if !equal(want, r) {
					panic("not what was published")
				}
				if random.IntN(2) == 0 {
					runtime.Gosched()
				}
				same := memory.holds(cell, generation)
				named := pages.Named(ref, Name{ByKey: true, Model: r.Model})
				live := pages.Live(ref)
				switch {
				case live && !same:
					panic("stale bytes of a live generation")
				case named && !r.HasKey:
					panic("a name came back")
				case pages.Named(ref, Name{ByKey: true, Model: r.Model + 1}):
					panic("a name that it never had")
				case !live && pages.Live(ref):
					panic("a generation came back")
				case live:
					hits[reader]++
				}
			}
		})
	}
	random := rand.New(rand.NewPCG(99, 99))
	var held [cellCount]int32
	for cell := range held {
		held[cell] = -1
	}
	for generation := uint64(1); generation <= rounds; generation++ {
		cell := random.IntN(cellCount)
		p.Withdraw(held[cell])
		memory.fill(cell, math.MaxUint64)
		if random.IntN(2) == 0 {
			p.Unname(held[random.IntN(cellCount)], random.IntN(2) == 0, true)
		}
		memory.fill(cell, generation)
		held[cell] = p.Publish(recordIn(generation, cell))
		if held[cell] < 0 {
			panic("no room")
		}
		newest.Store(generation)
		if generation%16 == 0 {
			runtime.Gosched()
		}
	}
	done.Store(true)
	readers.Wait()
	for reader := range hits {
		require.NotZero(t, hits[reader], "a reader that never found anything has tested nothing")
	}
}

func equal(a, b Record) bool {
	if len(a.Addrs) != len(b.Addrs) {
		return false
	}
	for i := range a.Addrs {
		if a.Addrs[i] != b.Addrs[i] {
			return false
		}
	}
	return a.ID == b.ID && a.Generation == b.Generation && a.Shape == b.Shape && a.Accessible == b.Accessible && a.Pool == b.Pool &&
		a.HasKey == b.HasKey && a.Model == b.Model
}

func BenchmarkLive(b *testing.B) {
	p, pages := published(b)
	p.Publish(record(4, 64))
	ref := requireFound(b, pages, record(4, 64))
	for b.Loop() {
		if !pages.Live(ref) || !pages.Named(ref, Name{}) {
			b.Fatal("it is there")
		}
	}
}

func BenchmarkFind(b *testing.B) {
	p, pages := published(b)
	p.Publish(record(4, 64))
	for b.Loop() {
		if _, _, ok := pages.Find(4); !ok {
			b.Fatal("it is there")
		}
	}
}

func BenchmarkFindNothing(b *testing.B) {
	_, pages := published(b)
	for b.Loop() {
		if _, _, ok := pages.Find(4); ok {
			b.Fatal("it is not there")
		}
	}
}

func BenchmarkPublishAndWithdraw(b *testing.B) {
	p, _ := published(b)
	r := record(4, 64)
	for b.Loop() {
		p.Withdraw(p.Publish(r))
	}
}

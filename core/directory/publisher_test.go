// SPDX-License-Identifier: Apache-2.0

package directory

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"math"
	"os"
	"os/exec"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/plan"
	"github.com/llm-datadist-open/llm-datadist/core/status"
	"github.com/llm-datadist-open/llm-datadist/core/testkit"
)

func TestWhatIsPublishedIsFoundUntilItIsWithdrawn(t *testing.T) {
	p, pages := published(t)
	const caches = 50
	held := map[uint64]int32{}
	for generation := uint64(1); generation <= caches; generation++ {
		held[generation] = p.Publish(record(generation, uint32(generation*generation)))
		require.NotEqual(t, int32(-1), held[generation])
	}
	for generation := uint64(1); generation <= caches; generation++ {
		ref := requireFound(t, pages, record(generation, uint32(generation*generation)))
		require.EqualValues(t, held[generation], ref.Slot)
	}
	for generation := uint64(1); generation <= caches; generation += 2 {
		p.Withdraw(held[generation])
		p.Withdraw(held[generation]) // the slot is nobody's
	}
	for generation := uint64(1); generation <= caches; generation++ {
		if generation%2 == 1 {
			requireMissing(t, pages, generation)
		} else {
			requireFound(t, pages, record(generation, uint32(generation*generation)))
			p.Withdraw(held[generation])
		}
	}
	require.Zero(t, p.used)
	requireWhole(t, &p.arena)
	requireMissing(t, pages, 0)
	requireMissing(t, pages, caches+1)
}

// The bytes are what two versions that talk to each other agree upon.
func TestTheLayoutIsWhatItIs(t *testing.T) {
	p, _ := published(t)
	r := Record{
		ID: 0x0102030405060708, Generation: 5, Shape: plan.Shape{Kind: plan.Blocks, Tensors: 2, TensorBytes: 0x3000, Stride: 0x1000, Count: 3},
		Accessible: true, Pool: 2, HasKey: true, Model: 77, Addrs: []uintptr{0xabcd000, 0xef01000},
	}
	require.EqualValues(t, 4, p.Publish(record(4, 65)), "it takes the first words of the arena")
	require.EqualValues(t, 5, p.Publish(r))
	bytes := mem.View(mapped(t, p.FD()).Addr(), pagesBytes)
	word := func(at int) uint64 { return binary.LittleEndian.Uint64(bytes[8*at:]) }
	require.Equal(t, "LLMDDirs", string(bytes[:8]))
	require.EqualValues(t, 1, word(1))
	require.Equal(t, us[:], bytes[16:32])
	require.Equal(t, []uint64{4096, 8, 1 << 20}, []uint64{word(4), word(5), word(6)})
	require.Zero(t, word(8), "not dead")
	require.True(t, mem.Vowed(word(11)))
	require.EqualValues(t, 5, word(512+5))
	at := 512 + 4096 + 5*8
	require.Equal(t, []uint64{3, 0x0102030405060708, 2<<32 | 1<<8 | 2, 77, 128<<32 | 2, 0x3000, 0x1000, 3},
		[]uint64{word(at), word(at + 1), word(at + 2), word(at + 3), word(at + 4), word(at + 5), word(at + 6), word(at + 7)})
	arena := 512 + 4096 + 8*4096
	require.Equal(t, []uint64{0xabcd000, 0xef01000}, []uint64{word(arena + 128), word(arena + 129)})
	require.Len(t, bytes, 8*(arena+1<<20))
	require.EqualValues(t, len(bytes), p.Bytes())

	p.Unname(5, true, false)
	require.EqualValues(t, 2, word(at))
	p.Withdraw(5)
	require.Zero(t, word(512+5))
	p.MarkDead()
	require.EqualValues(t, 1, word(8))
}

func TestNamesAreLostOneByOne(t *testing.T) {
	p, pages := published(t)
	byID, byKey := Name{}, Name{ByKey: true, Model: 2}
	for _, c := range []struct{ id, key bool }{{false, false}, {true, false}, {false, true}, {true, true}} {
		slot := p.Publish(record(8, 3)) // the blocks key of model 2
		ref := requireFound(t, pages, record(8, 3))
		require.True(t, pages.Named(ref, byID))
		require.True(t, pages.Named(ref, byKey))
		require.False(t, pages.Named(ref, Name{ByKey: true, Model: 3}))
		p.Unname(slot, c.id, c.key)
		require.Equal(t, !c.id, pages.Named(ref, byID))
		require.Equal(t, !c.key, pages.Named(ref, byKey))
		require.True(t, pages.Live(ref), "its memory is its own still")
		found, _, ok := pages.Find(8)
		require.True(t, ok)
		require.Equal(t, !c.key, found.HasKey)
		p.Withdraw(slot)
		require.False(t, pages.Named(ref, byID))
		require.False(t, pages.Named(ref, byKey))
	}
	slot := p.Publish(record(9, 3))
	ref := requireFound(t, pages, record(9, 3))
	require.True(t, pages.Named(ref, byID))
	require.False(t, pages.Named(ref, Name{ByKey: true}), "no key, not the one of model 0")
	require.False(t, pages.Named(Ref{ref.Slot + 1, 9}, byID))
	require.False(t, pages.Named(Ref{slots, 9}, byID))
	require.False(t, pages.Named(Ref{math.MaxUint32, 9}, byID))
	require.False(t, pages.Named(Ref{ref.Slot, 8}, byID))
	require.False(t, pages.Named(Ref{ref.Slot + 1, 0}, byID))
	p.Withdraw(slot)
	p.Unname(slot, true, true) // nobody's slot
	p.Unname(-1, true, true)
	p.Unname(slots, true, true)
	p.Withdraw(-1)
	p.Withdraw(slots)
}

func TestASlotThatIsTakenIsPassedOver(t *testing.T) {
	p, pages := published(t)
	for i, generation := range []uint64{slots - 1, 2*slots - 1, 3*slots - 1} {
		require.EqualValues(t, (slots-1+i)%slots, p.Publish(record(generation, 1)))
	}
	p.Withdraw(slots - 1)
	requireMissing(t, pages, slots-1)
	requireFound(t, pages, record(2*slots-1, 1))
	requireFound(t, pages, record(3*slots-1, 1))
	require.EqualValues(t, slots-1, p.Publish(record(4*slots-1, 1)), "home again")
	requireFound(t, pages, record(4*slots-1, 1))
}

func TestCachesBeyondTheSlotsAreNotPublished(t *testing.T) {
	p, pages := published(t)
	const tensors = arenaWords / slots
	for generation := uint64(1); generation <= slots; generation++ {
		require.NotEqual(t, int32(-1), p.Publish(record(generation, tensors)), "all slots can be used")
	}
	require.EqualValues(t, -1, p.Publish(record(slots+1, 1)))
	requireMissing(t, pages, slots+1)
	for generation := uint64(1); generation <= slots; generation += 100 {
		requireFound(t, pages, record(generation, tensors))
	}
	p.Withdraw(77)
	require.EqualValues(t, 77, p.Publish(record(slots+2, tensors)), "the one that is free")
	requireFound(t, pages, record(slots+2, tensors))
	requireMissing(t, pages, 77)
	for slot := range int32(slots) {
		p.Withdraw(slot)
	}
	require.Zero(t, p.used)
	requireWhole(t, &p.arena)
}

func TestCachesBeyondTheArenaAreNotPublished(t *testing.T) {
	p, pages := published(t)
	whole := record(1, arenaWords)
	slot := p.Publish(whole)
	requireFound(t, pages, whole)
	require.EqualValues(t, -1, p.Publish(record(2, 1)))
	requireMissing(t, pages, 2)
	p.Withdraw(slot)
	require.EqualValues(t, -1, p.Publish(record(3, arenaWords+1)))
	require.NotEqual(t, int32(-1), p.Publish(record(4, arenaWords/2)))
	require.EqualValues(t, -1, p.Publish(record(5, arenaWords/2+1)))
	require.NotEqual(t, int32(-1), p.Publish(record(6, arenaWords/2)))
	requireFound(t, pages, record(4, arenaWords/2))
	requireFound(t, pages, record(6, arenaWords/2))
}

func TestWhatNoPeerCouldUseIsNotPublished(t *testing.T) {
	p, _ := published(t)
	for name, change := range map[string]func(*Record){
		"no generation":            func(r *Record) { r.Generation = 0 },
		"no kind":                  func(r *Record) { r.Shape.Kind = 0 },
		"another kind":             func(r *Record) { r.Shape.Kind = 3 },
		"no tensors":               func(r *Record) { r.Shape.Tensors, r.Addrs = 0, nil },
		"an address too few":       func(r *Record) { r.Addrs = r.Addrs[1:] },
		"sizes differ":             func(r *Record) { r.Shape.TensorBytes-- },
		"no bytes":                 func(r *Record) { r.Shape.TensorBytes, r.Shape.Stride = 0, 0 },
		"overflow of a tensor":     func(r *Record) { r.Shape.Stride, r.Shape.Count, r.Shape.TensorBytes = 1<<33, 1<<33, 1<<2 },
		"overflow of all tensors":  func(r *Record) { r.Shape.Stride, r.Shape.Count, r.Shape.TensorBytes = 1<<62, 1, 1<<62 },
		"beyond the address space": func(r *Record) { r.Addrs[1] = math.MaxUint64 - 1<<20 + 1 },
	} {
		r := record(4, 2)
		change(&r)
		require.EqualValues(t, -1, p.Publish(r), name)
	}
	require.Zero(t, p.used)
	requireWhole(t, &p.arena)
	atTheEnd := record(4, 2)
	atTheEnd.Addrs[1] = math.MaxUint64 - 1<<20
	require.EqualValues(t, 4, p.Publish(atTheEnd))
}

func TestNothingLivesInADeadDirectory(t *testing.T) {
	for name, end := range map[string]func(*Publisher){
		"marked dead": func(p *Publisher) { p.MarkDead(); p.MarkDead() },
		"closed":      func(p *Publisher) { _ = p.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			p, pages := published(t)
			p.Publish(record(1, 3))
			ref := requireFound(t, pages, record(1, 3))
			end(p)
			require.False(t, pages.Live(ref))
			require.False(t, pages.Named(ref, Name{}))
			requireMissing(t, pages, 1)
			p.Publish(record(2, 3))
			requireMissing(t, pages, 2)
		})
	}
}

func TestAClosedPublisherDoesNothing(t *testing.T) {
	check(t)
	p, err := NewPublisher(us)
	require.NoError(t, err)
	slot := p.Publish(record(1, 1))
	require.NoError(t, p.Close())
	require.NoError(t, p.Close())
	p.Unname(slot, true, true)
	p.Withdraw(slot)
	p.MarkDead()
	require.EqualValues(t, -1, p.Publish(record(2, 1)))
}

func TestDirectoriesOfOthersAreNotOpened(t *testing.T) {
	p, _ := published(t)
	m := mapped(t, p.FD())
	other := us
	other[15]++
	_, err := OpenPages(m, other)
	require.ErrorIs(t, err, status.Failed)
	require.ErrorContains(t, err, "another engine's")
	for _, at := range []uint64{atMagic, atVersion, atIncarnation, atIncarnation + 1, atSlots, atRecordWords, atArenaWords} {
		before := p.words[at].Load()
		p.words[at].Store(before + 1)
		_, err := OpenPages(m, us)
		require.ErrorIs(t, err, status.Failed)
		require.Equal(t, status.StageHandshake, status.From(err, "").Stage)
		p.words[at].Store(before)
	}
	_, err = OpenPages(m, us)
	require.NoError(t, err)
	for _, words := range []int{0, 1, pagesWords - 1} {
		_, err = openWords(m.Words()[:words], us)
		require.ErrorIs(t, err, status.Failed)
	}
}

func TestReadingAndWithdrawingAllocateNothing(t *testing.T) {
	p, pages := published(t)
	p.Publish(record(4, 100))
	ref := requireFound(t, pages, record(4, 100))
	require.Zero(t, testing.AllocsPerRun(100, func() {
		if !pages.Live(ref) || !pages.Named(ref, Name{}) || !pages.Named(ref, Name{ByKey: true, Model: 1}) {
			panic("it is there")
		}
	}))
	first := record(8, 100)
	require.Zero(t, testing.AllocsPerRun(100, func() {
		slot := p.Publish(first)
		p.Unname(slot, false, true)
		p.Withdraw(slot)
	}))
}

// ownerVariable makes the test binary an owner, which publishes one cache, says where, and waits until its input ends.
const ownerVariable = "DIRECTORY_TEST_OWNER"

func beOwner() {
	p, err := NewPublisher(us)
	if err != nil {
		fmt.Println(err)
		return
	}
	p.Publish(record(7, 3))
	fmt.Printf("/proc/%d/fd/%d\n", os.Getpid(), p.FD())
	_, _ = os.Stdin.Read(make([]byte, 1))
	_ = p.Close()
}

func TestTheDeathOfAnOwnerIsSeenAtOnce(t *testing.T) {
	for _, how := range []string{"finalize", "kill -9"} {
		t.Run(how, func(t *testing.T) {
			check(t)
			self, err := os.Executable()
			require.NoError(t, err)
			owner := exec.Command(self)
			owner.Env = append(os.Environ(), ownerVariable+"=1")
			owner.Stderr = os.Stderr
			input, err := owner.StdinPipe()
			require.NoError(t, err)
			output, err := owner.StdoutPipe()
			require.NoError(t, err)
			require.NoError(t, owner.Start())
			t.Cleanup(func() { _ = owner.Process.Kill() }) // where the test fails before its end
			line, err := bufio.NewReader(output).ReadString('\n')
			require.NoError(t, err)
			fd, err := unix.Open(line[:len(line)-1], unix.O_RDONLY|unix.O_CLOEXEC, 0)
			require.NoError(t, err, line)
			m, err := mem.MapShared(fd, pagesBytes, mem.PagesSeals)
			require.NoError(t, err)
			require.NoError(t, unix.Close(fd))
			defer func() { require.NoError(t, m.Close()) }()
			pages, err := OpenPages(m, us)
			require.NoError(t, err)
			ref := requireFound(t, pages, record(7, 3))
			require.True(t, pages.Named(ref, Name{}))

			testkit.Stop(t, owner.Process.Pid)
			require.True(t, pages.Live(ref), "a stopped owner is none that is dead")
			requireFound(t, pages, record(7, 3))
			require.NoError(t, owner.Process.Signal(unix.SIGCONT))
			if how == "finalize" {
				require.NoError(t, input.Close())
				require.NoError(t, owner.Wait())
			} else {
				require.NoError(t, owner.Process.Kill())
				require.Error(t, owner.Wait())
			}
			require.False(t, pages.Live(ref))
			require.False(t, pages.Named(ref, Name{}))
			requireMissing(t, pages, 7)
		})
	}
}

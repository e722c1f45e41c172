// SPDX-License-Identifier: Apache-2.0

package mem

import (
	"context"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Crew copies on several threads: on the goroutine that asks, and on helpers that are parked between copies and shared by all of them.
// Nothing spins while there is nothing to copy. The methods may be called from several goroutines at once; Close comes last.
type Crew struct {
	threads int
	start   sync.Once      // of the helpers, by the first copy that wants some
	helpers sync.WaitGroup // goroutines of help
	calls   sync.WaitGroup // goroutines of call, and alarms that are set
	invites chan invite
	jobs    sync.Pool // of *job; the crew's own, because channels and timers belong to the synctest bubble that they were made in
	// pays is the total for each helper from which it pays off; 0: as Calibrate says.
	pays uint64
}

const (
	// leastClaim is the least that a thread takes at a time: some 10 us of work, beside which the claim costs nothing. It also is how
	// much later than the others the last thread ends at worst.
	leastClaim = 64 << 10
	// mostClaim is the most, so that an ended context is seen and garbage collection goes on soon.
	mostClaim = copyChunk
	// mostCallClaim is the same for copies by system calls, for which garbage collection does not wait. Two threads at the two ends of a
	// huge page contend for its reference count, so that small claims cost a tenth.
	mostCallClaim = 8 << 20
	// keptInvites is how many invites may wait for helpers that are busy. An invite whose job has ended costs a helper next to nothing;
	// one that finds no room is not sent, and its job does with fewer threads.
	keptInvites = 64
	// eagerRounds of pause come first when the caller waits for its helpers, some 10 us, which is how long a last claim takes: where
	// the caller is bound to its thread, as one who has come through cgo is, to give way takes longer than that.
	eagerRounds = 16
	// patience is how long the caller looks for the end of its helpers, giving way to others, before it blocks: about what a goroutine
	// that blocks takes to wake.
	patience = 50 * time.Microsecond
	// patientRounds bounds the same where no time passes, in a synctest bubble.
	patientRounds = 1000
	// partAbove is what a helper leaves the caller's core for: it takes some hundred us on one.
	partAbove = 4 << 20
	// partYields is how often the caller lets others run while no helper has come, after claims of partClaim.
	partYields = 8
	partClaim  = 256 << 10
)

// NewCrew makes a crew of at most threads threads a copy, the caller's among them. Its helpers are started when they are first needed.
func NewCrew(threads int) *Crew {
	return &Crew{threads: max(threads, 1), invites: make(chan invite, keptInvites)}
}

// Close waits for the helpers to end. No Copy is under way or comes later.
func (c *Crew) Close() {
	c.calls.Wait()
	close(c.invites)
	c.helpers.Wait()
}

// Copy copies moves, which are total bytes, by method: on the calling goroutine, and on as many helpers as pay off for total. The moves
// are done in any order. It looks at ctx.Err() before each chunk of at most 1 MiB, and returns that or the first error of method; what
// was copied until then stays copied. When it has returned nothing of it touches the memory any more. It allocates nothing.
func (c *Crew) Copy(ctx context.Context, moves []Move, total uint64, method Method) (err error) {
	helpers := c.worth(total, method)
	if helpers == 0 {
		return copyAlone(ctx, moves, total, method)
	}
	j := c.open(ctx, moves, total, method, helpers)
	defer func() { // also where the method panics: then nothing more is claimed
		j.claimed.Store(total)
		err = c.finish(j)
	}()
	var stint Stint
	stint.Begin()
	yields := 0
	if j.core >= 0 {
		yields = partYields
	}
	j.work(&stint, yields)
	return nil
}

// systemCallCost is how much longer copies by system calls take than those that were measured, about.
const systemCallCost = 2

// worth says how many helpers pay off.
func (c *Crew) worth(total uint64, method Method) int {
	if c.threads == 1 {
		return 0
	}
	if !byStores(method) {
		total *= systemCallCost
	}
	pays := c.pays
	if pays == 0 {
		if total < leastPays {
			return 0
		}
		pays = Calibrate().pays()
	}
	if total < pays {
		return 0
	}
	most := min(c.threads, runtime.GOMAXPROCS(0)) - 1
	return int(min(uint64(most), total/pays))
}

// byStores tells the methods that copy by instructions of ours from those that make system calls.
func byStores(method Method) bool {
	switch method.(type) {
	case plainStores, streamingStores:
		return true
	}
	return false
}

// mostAtOnce is the most that a thread takes at a time.
func mostAtOnce(method Method) uint64 {
	if byStores(method) {
		return mostClaim
	}
	return mostCallClaim
}

// copyAlone is Copy without helpers.
func copyAlone(ctx context.Context, moves []Move, total uint64, method Method) error {
	at, most, calls := place{moves: moves}, mostAtOnce(method), !byStores(method)
	var stint Stint
	stint.Begin()
	for from := uint64(0); from < total; from += most {
		if err := ctx.Err(); err != nil {
			return err
		}
		at.seek(from)
		if err := method.Copy(at.moves, from-at.before, min(most, total-from)); err != nil {
			return err
		}
		if calls {
			stint.GiveWay()
		}
	}
	return nil
}

// place is where one thread is in a list of moves. Claims only grow, so one walk along the list serves all claims of a thread.
type place struct {
	moves  []Move
	before uint64 // bytes of the list before moves
}

// seek moves on to the move that byte from of the list is in.
func (p *place) seek(from uint64) {
	for p.before+p.moves[0].Bytes <= from {
		p.before += p.moves[0].Bytes
		p.moves = p.moves[1:]
	}
}

// job is one Copy with helpers. It is used again for a later one, so that a helper that wakes late may hold an invite to what the
// job no longer is: state tells.
type job struct {
	crew  *Crew
	alarm *time.Timer
	done  chan struct{} // the last member to leave answers here where the caller waits; room for one, and never more than one is in it

	// state is, from the top: the epoch, 32 bits, one more for each copy; jobOpen; jobAwaited; the number of members.
	state   atomic.Uint64
	helpers atomic.Int32 // that are wanted

	// What follows is written while nobody is a member and the job isn't open, and read by the caller and the members.
	ctx    context.Context
	moves  []Move
	total  uint64
	method Method
	core   int    // that the caller was on; -1: not known, or it does not matter
	shares uint64 // twice the number of threads: what is left is claimed in that many parts
	most   uint64 // bytes of one claim

	claimed atomic.Uint64 // bytes of the list that some thread has taken, or total after a failure

	mu  sync.Mutex // guards what follows while there are members
	err error
}

const (
	jobOpen       = 1 << 31 // helpers may join
	jobAwaited    = 1 << 30 // the caller waits for done
	jobMembers    = jobAwaited - 1
	jobEpochShift = 32
)

// invite asks a helper to join a job in one epoch.
type invite struct {
	job   *job
	epoch uint64
}

// open makes a job and has helpers called.
//
// A helper that the caller made ready itself would come late: it would stand where the caller's thread is expected to run it next, and
// another thread that looks for work leaves it there for 3 us, which a timer makes 60 us or more. An alarm that is due runs on
// whichever thread looks for work first, which the runtime wakes at once, and so do the helpers that are made ready there.
func (c *Crew) open(ctx context.Context, moves []Move, total uint64, method Method, helpers int) *job {
	j, _ := c.jobs.Get().(*job)
	if j == nil {
		j = &job{crew: c, done: make(chan struct{}, 1)}
		j.alarm = time.AfterFunc(never, j.call)
		j.alarm.Stop()
	}
	j.ctx, j.moves, j.total, j.method, j.err = ctx, moves, total, method, nil
	j.shares, j.most = 2*uint64(helpers+1), mostAtOnce(method)
	if j.core = -1; total >= partAbove {
		j.core = currentCore()
	}
	j.claimed.Store(0)
	j.helpers.Store(int32(helpers))
	j.state.Store((j.state.Load()>>jobEpochShift+1)<<jobEpochShift | jobOpen)
	c.calls.Add(1)
	j.alarm.Reset(0)
	return j
}

// never is later than any process lives.
const never = time.Duration(1<<63 - 1)

// finish closes a job for helpers, waits for those that have joined, and gives it back.
func (c *Crew) finish(j *job) error {
	if j.alarm.Stop() {
		c.calls.Done()
	}
	if before := j.state.And(^uint64(jobOpen)); before&jobMembers > 0 {
		j.await()
	}
	err := j.err
	j.ctx, j.moves, j.method, j.err = nil, nil, nil, nil
	c.jobs.Put(j)
	return err
}

// call invites helpers on behalf of a copy that has set the alarm. When it comes late the job is another one, or none.
func (j *job) call() {
	defer j.crew.calls.Done()
	state := j.state.Load()
	if state&jobOpen == 0 {
		return
	}
	j.crew.start.Do(j.crew.startHelpers)
	for range j.helpers.Load() {
		select {
		case j.crew.invites <- invite{j, state >> jobEpochShift}:
		default:
			return
		}
	}
}

func (c *Crew) startHelpers() {
	for range c.threads - 1 {
		c.helpers.Go(c.help)
	}
}

// help is the life of a helper.
func (c *Crew) help() {
	var stint Stint
	var cores, home unix.CPUSet
	for i := range c.invites {
		if i.job.join(i.epoch) {
			stint.Begin()
			i.job.part(&stint, &cores, &home)
			i.job.work(&stint, 0)
			i.job.leave()
			stint.Leave()
		}
	}
}

// part has a helper that finds itself on the caller's core go to another one. Where the machine is busy the kernel does not look for an
// idle core when it wakes a thread, and with few cores moves it to one after some milliseconds, which for most copies is too late.
func (j *job) part(stint *Stint, cores, home *unix.CPUSet) {
	if j.core < 0 || currentCore() != j.core || unix.SchedGetaffinity(0, home) != nil {
		return
	}
	*cores = *home
	if cores.Clear(j.core); cores.Count() > 0 {
		stint.Keep(cores, home)
	}
}

// currentCore is the core that the calling thread is on, or -1.
func currentCore() int {
	var core uint32
	if _, _, errno := unix.RawSyscall(unix.SYS_GETCPU, uintptr(unsafe.Pointer(&core)), 0, 0); errno != 0 {
		return -1
	}
	return int(core)
}

// join makes the caller a member, unless the job has ended. A member may use the job until it leaves.
func (j *job) join(epoch uint64) bool {
	for {
		state := j.state.Load()
		if state>>jobEpochShift != epoch || state&jobOpen == 0 {
			return false
		}
		if j.state.CompareAndSwap(state, state+1) {
			return true
		}
	}
}

func (j *job) leave() {
	state := j.state.Add(^uint64(0))
	if state&jobAwaited != 0 && state&jobMembers == 0 {
		j.done <- struct{}{}
	}
}

// await returns when the last member has left a job that nobody can join any more.
func (j *job) await() {
	for range eagerRounds {
		if j.state.Load()&jobMembers == 0 {
			return
		}
		pause()
	}
	for round, begin := 0, time.Now(); round < patientRounds && time.Since(begin) < patience; round++ {
		if j.state.Load()&jobMembers == 0 {
			return
		}
		runtime.Gosched()
	}
	for {
		state := j.state.Load()
		if state&jobMembers == 0 {
			return
		}
		if j.state.CompareAndSwap(state, state|jobAwaited) {
			<-j.done
			return
		}
	}
}

// work copies what nobody has taken, until nothing is left or something fails. A thread that was woken and has to wait for the caller's
// core gets it after a claim, for so many claims as yields says.
func (j *job) work(stint *Stint, yields int) {
	at, calls := place{moves: j.moves}, !byStores(j.method)
	for {
		if j.claimed.Load() == j.total {
			return
		}
		if err := j.ctx.Err(); err != nil {
			j.fail(err)
			return
		}
		most := j.most
		if yields > 0 {
			most = min(most, partClaim)
		}
		from, bytes := j.claim(most)
		if bytes == 0 {
			return
		}
		at.seek(from)
		if err := j.method.Copy(at.moves, from-at.before, bytes); err != nil {
			j.fail(err)
			return
		}
		if calls {
			stint.GiveWay()
		}
		if yields > 0 {
			if yields--; j.state.Load()&jobMembers > 0 {
				yields = 0
			} else {
				Yield()
			}
		}
	}
}

// claim takes the next bytes of the list, at most so many: a share of what is left, so that claims are large at first and small at the
// end, where threads wait for one another.
func (j *job) claim(most uint64) (from, bytes uint64) {
	for {
		from = j.claimed.Load()
		left := j.total - from
		bytes = min(max(left/j.shares&^(leastClaim-1), leastClaim), most, left)
		if bytes == 0 || j.claimed.CompareAndSwap(from, from+bytes) {
			return from, bytes
		}
	}
}

// fail keeps the first error, and leaves nothing to claim.
func (j *job) fail(err error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.err == nil {
		j.err = err
	}
	j.claimed.Store(j.total)
}

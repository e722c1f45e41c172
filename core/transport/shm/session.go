// SPDX-License-Identifier: Apache-2.0

package shm

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/llm-datadist-open/llm-datadist/core/directory"
	"github.com/llm-datadist-open/llm-datadist/core/mem"
	"github.com/llm-datadist-open/llm-datadist/core/plan"
	"github.com/llm-datadist-open/llm-datadist/core/transport"
)

// Control is the session over the link's data connections: it resolves keys, serves the peer, and streams what can't be read.
type Control interface {
	transport.Session
	transport.Control
}

// Config is what a session is made from. All of it is required.
type Config struct {
	Share       *Share
	Control     Control // the session takes it over, but where NewSession fails
	Incarnation [16]byte
	Pid         int    // of the peer, in our own pid namespace; 0: not known, then private memory is streamed
	Text        []byte // the peer's gift; see Share.Gift
	FDs         []int  // the session takes them over, also where NewSession fails
}

const (
	// batchBytes is what one Read is given at most: so much that starting and joining the helpers costs nothing beside it.
	batchBytes = 1 << 30
	// inlineBytes is copied in 8 to 30 ms: well within the time for which a caller may be away.
	inlineBytes = 128 << 20
	// prefaultStep bounds how long a session that is closed waits: 8 MiB are some 0.2 ms.
	prefaultStep = 8 << 20
)

// Session is the shm transport of one link.
type Session struct {
	*transport.Direct
	share   *Share
	pages   *directory.Pages
	maps    []*mem.Mapping // the directory, then the pools
	process mem.Process
	made    time.Time
	refusal atomic.Pointer[refusal]
	tasks   sync.WaitGroup // populate
	forbid  func()         // ends the peer's permission to read our private memory, as far as it is this link's
	closed  atomic.Bool
	release sync.Once
}

// refusal is why private memory is streamed.
type refusal struct {
	err   error
	again time.Time // when to ask once more, since the peer may not have permitted it yet; zero: never
}

const (
	// permitWithin is how long after the link was made the peer's permission may come: it gives it as soon as it hears of the link.
	permitWithin = 5 * time.Second
	// askEvery is how often it is looked for meanwhile.
	askEvery = 100 * time.Millisecond
)

// NewSession maps what the peer has given and finds out whether its private memory can be read.
func NewSession(cfg Config) (*Session, error) {
	defer closeAll(cfg.FDs) // what is mapped stays
	o, err := readOffer(cfg.Text)
	if err != nil {
		return nil, err
	}
	if len(cfg.FDs) != 1+len(o.Pools) {
		return nil, fmt.Errorf("the peer gave %d descriptors for a directory and %d pools", len(cfg.FDs), len(o.Pools))
	}
	s := &Session{share: cfg.Share, forbid: ours.permit(cfg.Pid), made: time.Now()} // first of all: the peer looks for it
	if err := s.mapAll(o, cfg); err != nil {
		s.unmap()
		s.forbid()
		return nil, err
	}
	mem.Calibrate()
	s.process = mem.Process{Pid: cfg.Pid, CanaryAddr: uintptr(o.CanaryAt), Canary: [16]byte(o.Canary)}
	s.probe()
	s.Direct = transport.NewDirect(transport.DirectConfig{
		Control: cfg.Control, Directory: (*view)(s), Reader: (*reader)(s), Stream: cfg.Control, BatchBytes: batchBytes, InlineBytes: inlineBytes,
	})
	return s, nil
}

func (s *Session) mapAll(o offer, cfg Config) error {
	pages, err := mem.MapShared(cfg.FDs[0], o.Directory, mem.PagesSeals)
	if err != nil {
		return fmt.Errorf("map the peer's directory: %w", err)
	}
	s.maps = append(s.maps, pages)
	if s.pages, err = directory.OpenPages(pages, cfg.Incarnation); err != nil {
		return fmt.Errorf("read the peer's directory: %w", err)
	}
	for i, bytes := range o.Pools {
		pool, err := mem.MapShared(cfg.FDs[1+i], bytes, mem.PoolSeals)
		if err != nil {
			return fmt.Errorf("map pool %d of the peer: %w", i, err)
		}
		s.maps = append(s.maps, pool)
	}
	return nil
}

func (s *Session) unmap() {
	for _, m := range s.maps {
		_ = m.Close() // an munmap of our own mapping
	}
}

// Close implements transport.Session. When it has returned the peer's memory is unmapped.
func (s *Session) Close(cause error) {
	s.closed.Store(true)
	s.Direct.Close(cause)
	s.release.Do(func() {
		s.tasks.Wait()
		s.forbid()
		s.unmap()
	})
}

// probe makes one real read of the peer's private memory.
func (s *Session) probe() {
	if s.process.Pid == 0 {
		s.refusal.Store(&refusal{err: errors.New("the peer's process is not visible from here")})
		return
	}
	err := s.process.Probe()
	if err == nil {
		s.refusal.Store(nil)
		return
	}
	no := &refusal{err: err}
	if now := time.Now(); errors.Is(err, unix.EPERM) && yamaAsks() && now.Sub(s.made) < permitWithin {
		no.again = now.Add(askEvery)
	}
	s.refusal.Store(no)
}

// Explain implements transport.Explainer.
func (s *Session) Explain() []string {
	lines := []string{fmt.Sprintf("memory of pools: mapped, %d of them", len(s.maps)-1)}
	if no := s.refusal.Load(); no != nil {
		return append(lines, fmt.Sprintf("private memory: streamed over the data connections, it can't be read: %v", no.err))
	}
	return append(lines, "private memory: read with process_vm_readv")
}

// view is the peer's directory with the addresses of this process.
type view Session

// Lookup implements directory.Reader.
func (v *view) Lookup(generation uint64) (directory.Located, bool) {
	record, ref, ok := v.pages.Find(generation)
	if !ok {
		return directory.Located{}, false
	}
	found := directory.Located{Ref: ref, Shape: record.Shape, Addrs: record.Addrs, Space: directory.Private}
	if record.Pool == 0 {
		return found, true
	}
	if int(record.Pool) >= len(v.maps) { // the directory is at 0
		return directory.Located{}, false
	}
	pool := v.maps[record.Pool]
	found.Space = directory.Mapped
	for i, offset := range record.Addrs {
		if uint64(offset) > pool.Bytes() || record.Shape.TensorBytes > pool.Bytes()-uint64(offset) {
			return directory.Located{}, false
		}
		found.Addrs[i] = pool.Addr() + offset
	}
	if record.Shape.Kind == plan.Blocks {
		v.prefault(found, pool)
	}
	return found, true
}

// Live implements directory.Reader.
func (v *view) Live(ref directory.Ref) bool { return v.pages.Live(ref) }

// Named implements directory.Reader.
func (v *view) Named(ref directory.Ref, name directory.Name) bool { return v.pages.Named(ref, name) }

// prefault enters the pages of a cache that will be read again and again into our page table, beside the first pulls, so that those to
// come don't fault. What the owner has not touched yet stays so.
func (v *view) prefault(at directory.Located, pool *mem.Mapping) {
	v.tasks.Go(func() {
		for _, addr := range at.Addrs {
			for done := uint64(0); done < at.Shape.TensorBytes; done += prefaultStep {
				step := min(prefaultStep, at.Shape.TensorBytes-done)
				if v.closed.Load() || !v.pages.Live(at.Ref) || pool.Populate(uint64(addr-pool.Addr())+done, step) != nil {
					return
				}
			}
		}
	})
}

// reader copies out of the peer's memory.
type reader Session

// Read implements transport.Reader.
func (r *reader) Read(ctx context.Context, access transport.Access, moves []mem.Move, total uint64) error {
	crew := r.share.crew
	switch {
	case access.From == directory.Private:
		return r.readProcess(ctx, moves, total)
	case access.Into == mem.BackingAnonymous:
		return crew.Copy(ctx, moves, total, mem.Stores(total))
	default: // a store into a file's page may kill the process, a system call answers EFAULT
		return crew.Copy(ctx, moves, total, mem.Kernel)
	}
}

func (r *reader) readProcess(ctx context.Context, moves []mem.Move, total uint64) error {
	if no := r.refusal.Load(); no != nil && !no.again.IsZero() && time.Now().After(no.again) {
		(*Session)(r).probe()
	}
	if r.refusal.Load() != nil {
		return transport.ErrNoAccess
	}
	err := r.share.crew.Copy(ctx, moves, total, &r.process)
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOSYS) {
		r.refusal.Store(&refusal{err: err})
		return transport.ErrNoAccess
	}
	if errors.Is(err, unix.ESRCH) { // gone, or without its main thread: the owner can tell, if it is there
		return transport.ErrNoAccess
	}
	return err
}

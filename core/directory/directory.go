// SPDX-License-Identifier: Apache-2.0

// Package directory is what an owner publishes of its table of caches, and how a peer reads it without the owner taking part.
//
// A direct transport resolves a key with the owner and gets a generation. A [Reader] turns that generation into addresses, and says
// after the bytes were read whether they still were that generation's. It promises that a generation is never used twice, and that
// memory is given back, or its owner may do with it what it likes, only after [Reader.Live] has become false for good. It never
// reads a cache's bytes, and it never decides what a key means: that is the owner's.
//
// Two things implement a Reader: the owner's table itself, for engines that share a process (core/cache), and pages that the owner
// shares with its peers, for those that share a host.
package directory

import "github.com/llm-datadist-open/llm-datadist/core/plan"

// Reader is a peer's view of one owner's directory. Its methods may be called from many goroutines, and never wait for the owner. A
// reader that can't tell, because what it read was being changed, says that a generation is not live.
type Reader interface {
	// Lookup describes the cache of a generation that is [Reader.Live]: its shape and the base of each tensor, in the owner's address
	// space. How these are reached is the transport's; so is it to check that they lie in memory that it may reach. The slice is not
	// changed by either side.
	Lookup(generation uint64) (shape plan.Shape, addrs []uintptr, live bool)
	// Live says that the memory of a generation is its own still: what was read before was never anything else. That outlives the
	// names where a lease holds the memory, and ends before the memory is given back or withdrawn.
	//
	// A Reader over shared pages puts a load fence between the reads of the caller and its own.
	Live(generation uint64) bool
	// Named says that the owner would still find the generation under a name: what was resolved earlier may be used once more.
	Named(generation uint64) bool
}

// SPDX-License-Identifier: Apache-2.0

package cache

// extent is a run of pages.
type extent struct{ start, pages uint64 }

func (e extent) end() uint64 { return e.start + e.pages }

// extentSet is the set of free pages, as maximal runs. It is a treap ordered by address in which each node knows the largest run
// below it: taking pages from the lowest run that is large enough, and giving some back, are both O(log n) in the number of runs.
type extentSet struct{ root *extentNode }

type extentNode struct {
	extent
	left, right *extentNode
	priority    uint64 // of a heap: no child's is above its parent's
	largest     uint64 // pages of the largest run in this subtree
}

// take removes pages from the lowest run that has them. It fails when no run does.
func (s *extentSet) take(pages uint64) (start uint64, ok bool) {
	if pages == 0 || s.root.most() < pages {
		return 0, false
	}
	s.root, start = s.root.take(pages)
	return start, true
}

// give adds a run of pages, none of which is in the set, and joins it with its neighbours.
func (s *extentSet) give(run extent) {
	low, high := s.root.split(run.start)
	if last := low.edge(right); last != nil && last.end() == run.start {
		low, _ = low.split(last.start)
		run = extent{last.start, last.pages + run.pages}
	}
	if first := high.edge(left); first != nil && first.start == run.end() {
		_, high = high.split(first.start + 1)
		run.pages += first.pages
	}
	node := &extentNode{extent: run, priority: scatter(run.start), largest: run.pages}
	s.root = join(join(low, node), high)
}

// most is the largest run in the subtree.
func (n *extentNode) most() uint64 {
	if n == nil {
		return 0
	}
	return n.largest
}

func (n *extentNode) update() *extentNode {
	n.largest = max(n.pages, n.left.most(), n.right.most())
	return n
}

// take removes pages from the lowest run that fits, which is there, and returns the subtree that is left.
func (n *extentNode) take(pages uint64) (rest *extentNode, start uint64) {
	switch {
	case n.left.most() >= pages:
		n.left, start = n.left.take(pages)
	case n.pages > pages:
		start = n.start // the run shrinks from below, which keeps the order
		n.start += pages
		n.pages -= pages
	case n.pages == pages:
		return join(n.left, n.right), n.start
	default:
		n.right, start = n.right.take(pages)
	}
	return n.update(), start
}

// split parts the runs that begin below start from the others.
func (n *extentNode) split(start uint64) (low, high *extentNode) {
	if n == nil {
		return nil, nil
	}
	if n.start < start {
		n.right, high = n.right.split(start)
		return n.update(), high
	}
	low, n.left = n.left.split(start)
	return low, n.update()
}

// join is the opposite of split: all of low is below all of high.
func join(low, high *extentNode) *extentNode {
	switch {
	case low == nil:
		return high
	case high == nil:
		return low
	case low.priority >= high.priority:
		low.right = join(low.right, high)
		return low.update()
	default:
		high.left = join(low, high.left)
		return high.update()
	}
}

type side bool

const left, right side = false, true

// edge is the outermost run on one side, or nil.
func (n *extentNode) edge(s side) *extentNode {
	for n != nil {
		next := n.left
		if s == right {
			next = n.right
		}
		if next == nil {
			break
		}
		n = next
	}
	return n
}

// scatter spreads page numbers over priorities (the finalizer of splitmix64), so that no order of calls makes the tree deep.
func scatter(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

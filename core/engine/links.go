// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"encoding/json"
	"net"
	"sync"

	"github.com/llm-datadist-open/llm-datadist/core/link"
	"github.com/llm-datadist-open/llm-datadist/core/status"
)

// Cluster is one LLMClusterInfo of link_clusters or unlink_clusters.
type Cluster struct {
	ID     *uint64  `json:"id"`     // remote_cluster_id; nil: never set
	Local  []string `json:"local"`  // local ips
	Remote []string `json:"remote"` // "ip:port"
}

// linkThreads is how many clusters one call links at a time (spec §7.6).
const linkThreads = 16

// LinkClusters links to all clusters, up to 16 at a time, until ctx ends, and returns one result each: nil or a *status.Error.
func (e *Engine) LinkClusters(ctx context.Context, clusters []Cluster) []error {
	return e.each(clusters, func(c Cluster) error { return e.linkCluster(ctx, c) })
}

// UnlinkClusters unlinks clusters in the same way. See spec §7.7.
func (e *Engine) UnlinkClusters(ctx context.Context, clusters []Cluster, force bool) []error {
	return e.each(clusters, func(c Cluster) error { return e.unlinkCluster(ctx, c, force) })
}

func (e *Engine) each(clusters []Cluster, call func(Cluster) error) []error {
	results := make([]error, len(clusters))
	var running sync.WaitGroup
	slots := make(chan struct{}, linkThreads)
	for i, cluster := range clusters {
		slots <- struct{}{}
		running.Go(func() {
			results[i] = call(cluster)
			<-slots
		})
	}
	running.Wait()
	return results
}

func (e *Engine) linkCluster(ctx context.Context, c Cluster) error {
	if err := e.checkCluster(c); err != nil {
		return e.refused(linkRefused, c, err)
	}
	if e.options.Directional {
		return c.named(e.linkDirectional(ctx, c))
	}
	_, err := e.dial(ctx, e.dialRequest(c))
	return c.named(err)
}

func (e *Engine) checkCluster(c Cluster) error {
	if len(c.Remote) != 1 {
		return status.Newf(status.ParamInvalid, status.StageCheck, "remote_ip_info_list has %d entries, not 1", len(c.Remote))
	}
	if res := e.options.LocalCommRes; res != nil && *res != "" {
		return checkCommRes(*res)
	}
	if !e.options.HasListen && len(c.Local) != 1 && e.options.CacheManager {
		return status.Newf(status.ParamInvalid, status.StageCheck, "local_ip_info_list has %d entries, not 1", len(c.Local))
	}
	return nil
}

// most bytes of a local communication resource (spec §7.6).
const mostCommRes = 64 << 10

// checkCommRes checks a local communication resource for JSON, version and size, as spec §14 row 23 says; nothing else is used.
func checkCommRes(text string) error {
	if len(text) > mostCommRes {
		return status.Newf(status.ParamInvalid, status.StageCheck, "llm.LocalCommRes has %d bytes, more than %d", len(text), mostCommRes)
	}
	var resource struct {
		Version string `json:"version"`
	}
	if err := json.Unmarshal([]byte(text), &resource); err != nil {
		return status.Newf(status.ParamInvalid, status.StageCheck, "llm.LocalCommRes is not the JSON of a resource: %w", err)
	}
	if resource.Version != "1.0" && resource.Version != "1.2" {
		return status.Newf(status.ParamInvalid, status.StageCheck, "llm.LocalCommRes has version %q, not \"1.0\" or \"1.2\"", resource.Version)
	}
	return nil
}

// dial makes a link and returns the cluster id that the peer reports.
func (e *Engine) dial(ctx context.Context, r link.DialRequest) (uint64, error) {
	if r.HasGivenID && e.standsFor(r.GivenID) {
		return r.GivenID, e.linkBack(r.GivenID)
	}
	return e.links.Dial(ctx, r)
}

func (e *Engine) dialRequest(c Cluster) link.DialRequest {
	r := link.DialRequest{Address: c.Remote[0]}
	if c.ID != nil {
		r.GivenID, r.HasGivenID = *c.ID, true
	}
	for _, ip := range c.Local {
		if r.Source == "" && isLocalAddress(ip) {
			r.Source = ip
		}
	}
	return r
}

// isLocalAddress reports that this machine has the address, so that it can be the source of a dial (spec §14 row 28).
func isLocalAddress(ip string) bool {
	wanted := net.ParseIP(ip)
	if wanted == nil || wanted.IsUnspecified() {
		return false
	}
	if wanted.IsLoopback() {
		return false // the kernel's own choice; a loopback source can't leave the host
	}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return false // then the kernel chooses
	}
	for _, addr := range addrs {
		if n, ok := addr.(*net.IPNet); ok && n.IP.Equal(wanted) {
			return true
		}
	}
	return false
}

// linkDirectional links for the hixl backend, where a link is this end's alone and known by the id that the caller gave.
func (e *Engine) linkDirectional(ctx context.Context, c Cluster) error {
	if c.ID != nil {
		if _, err := e.linkTo(*c.ID); err == nil {
			return status.New(status.AlreadyLink, status.StageCheck, "this end has linked to the cluster already")
		}
	}
	r := e.dialRequest(c)
	r.NameOnly = true
	reported, err := e.dial(ctx, r)
	if err != nil && status.CodeOf(err) != status.AlreadyLink { // the other end's link carries ours too
		return directionalCode(status.From(err, status.StageDial))
	}
	given := reported
	if c.ID != nil {
		given = *c.ID
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.owned[given] = reported
	return nil
}

// directionalCode maps what the hixl backend does not tell apart (spec §7.6, end).
func directionalCode(err *status.Error) *status.Error {
	switch err.Code {
	case status.ParamInvalid, status.Timeout, status.FeatureNotEnabled:
		return err
	}
	out := *err
	out.Code = status.Failed
	return &out
}

func (e *Engine) unlinkCluster(ctx context.Context, c Cluster, force bool) error {
	if c.ID == nil {
		return e.refused(unlinkRefused, c, status.New(status.ParamInvalid, status.StageCheck, "remote_cluster_id is not set"))
	}
	id := *c.ID
	if e.options.Directional {
		e.mu.Lock()
		defer e.mu.Unlock()
		delete(e.owned, id) // the connection stays for the other end's link, and goes with finalize or the peer
		return nil
	}
	if force {
		return c.named(e.links.Unlink(ctx, id, "", true))
	}
	if len(c.Remote) != 1 {
		return e.refused(unlinkRefused, c, status.Newf(status.ParamInvalid, status.StageCheck, "remote_ip_info_list has %d entries, not 1", len(c.Remote)))
	}
	return c.named(e.unlinkFailure(e.links.Unlink(ctx, id, c.Remote[0], false)))
}

const (
	linkRefused   = "link refused"
	unlinkRefused = "unlink refused"
)

// refused says what is wrong with a cluster's description, logs it as what it is, and keeps it for Explain: link calls return codes, not
// exceptions.
func (e *Engine) refused(what string, c Cluster, err error) error {
	failure := c.named(err)
	if c.ID != nil {
		e.links.Refused(*c.ID, what, failure)
	} else if e.parts.Event != nil {
		e.parts.Event(link.Event{Level: link.Error, Text: what, Cause: failure})
	}
	return failure
}

// named adds which cluster a result is about; nil stays nil.
func (c Cluster) named(err error) error {
	if err == nil {
		return nil
	}
	failure := status.From(err, status.StageDial)
	if c.ID != nil {
		address := ""
		if len(c.Remote) > 0 {
			address = c.Remote[0]
		}
		failure = failure.At(*c.ID, address)
	}
	return failure
}

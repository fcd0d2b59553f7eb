package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"tenon.dev/tenon/client"
	"tenon.dev/tenon/client/imageapi"
)

// auditFlags are those of both audits.
type auditFlags struct {
	format, failOn, least string
	all                   bool
}

func (o *auditFlags) add(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&o.format, "format", "table", "table, json, sarif, or a Go template")
	f.StringVar(&o.failOn, "fail-on", "", "End with 1 if a finding is as bad as this or worse: low, medium, high, critical")
	f.StringVar(&o.least, "severity", "", "Show only findings as bad as this or worse")
}

func (a *app) imageAuditCmd() *cobra.Command {
	var o auditFlags
	cmd := &cobra.Command{
		Use: "audit [OPTIONS] IMAGE [IMAGE...]", Short: "Find what is wrong with images: root user, setuid files, secrets, old bases",
		Long:    "Find what is wrong with images: root user, setuid files, secrets in layers (also those\nthat a later layer deletes), variables and history, accounts without a password, no health\ncheck, a base that has been replaced. Each finding says how to mend it.",
		Example: "tenon image audit app:1\ntenon image audit --severity high --fail-on high app:1\ntenon image audit --format sarif app:1 > audit.sarif",
		Args:    minArgs(1), ValidArgsFunction: a.completeAll(a.imageNames),
	}
	o.add(cmd)
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, args []string) error {
		return a.audit(ctx, c, args, nil, &o)
	})
	return cmd
}

func (a *app) auditCmd() *cobra.Command {
	var o auditFlags
	cmd := &cobra.Command{
		Use: "audit [OPTIONS] [CONTAINER|IMAGE...]", Short: "Find what is wrong with containers and images, and how to mend it",
		Long:    "Find what is wrong with containers and images; without names: with all containers that\nrun, and all images that have a name.\n\nContainers: root user, privileged, mounts and namespaces of the host, added capabilities,\nswitched off protections, ports open to the world, missing limits and health checks,\nsecrets in variables, images that are no longer what their name means; setuid programs and\nsecrets that it has written into its root. What a container\ncan do to its kernel counts less if that is its own (--isolation vm). Images: as tenon\nimage audit.",
		Example: "tenon audit\ntenon audit --fail-on critical web\ntenon audit --format json | jq '.findings[] | select(.rule == \"open-port\")'",
		Args:    minArgs(0), ValidArgsFunction: a.completeAll(a.containerNames(all), a.imageNames),
	}
	o.add(cmd)
	cmd.Flags().BoolVarP(&o.all, "all", "a", false, "Containers that do not run, too")
	cmd.RunE = a.do(func(ctx context.Context, c *client.Client, args []string) error {
		return a.audit(ctx, c, nil, args, &o)
	})
	return cmd
}

// ranks are severities in order.
var ranks = []string{imageapi.Low, imageapi.Medium, imageapi.High, imageapi.Critical}

func rank(s string) (int, error) {
	if s == "" {
		return -1, nil
	}
	i := slices.Index(ranks, strings.ToLower(s))
	if i < 0 {
		return 0, fmt.Errorf("invalid severity %q: want low, medium, high or critical", s)
	}
	return i, nil
}

func (a *app) audit(ctx context.Context, c *client.Client, images, names []string, o *auditFlags) error {
	fail, err := rank(o.failOn)
	if err != nil {
		return err
	}
	least, err := rank(o.least)
	if err != nil {
		return err
	}
	r, err := c.Audit(ctx, images, names, o.all)
	if err != nil {
		return err
	}
	worst := -1
	for _, f := range r.Findings {
		worst = max(worst, slices.Index(ranks, f.Severity))
	}
	r.Findings = slices.DeleteFunc(r.Findings, func(f imageapi.Finding) bool { return slices.Index(ranks, f.Severity) < least })
	switch o.format {
	case "", "table":
		err = a.table(func(tw *tabwriter.Writer) { writeFindings(tw, r) })
	case "sarif":
		err = a.writeSARIF(r)
	default:
		err = a.printOne(r, o.format)
	}
	for _, i := range r.Incomplete {
		a.complain("incomplete: " + i)
	}
	if err == nil && fail >= 0 && worst >= fail {
		return &exitError{code: exitFailure}
	}
	return err
}

// writeFindings writes the findings by subject, the worst first, with their remedies.
func writeFindings(tw *tabwriter.Writer, r imageapi.AuditReport) {
	n := map[string]int{}
	var subjects []string
	by := map[string][]imageapi.Finding{}
	for _, f := range r.Findings {
		n[f.Severity]++
		s := f.Kind + " " + f.Subject
		if by[s] == nil {
			subjects = append(subjects, s)
		}
		by[s] = append(by[s], f)
	}
	for _, s := range subjects {
		fmt.Fprintln(tw, s)
		for _, f := range by[s] {
			where := f.Where
			if where != "" {
				where += ": "
			}
			fmt.Fprintf(tw, "  %s\t%s\t%s%s\n", strings.ToUpper(f.Severity), f.Rule, where, f.Message)
			fmt.Fprintf(tw, "  \t\t→ %s\n", f.Fix)
		}
		fmt.Fprintln(tw)
	}
	fmt.Fprintf(tw, "%s and %s looked at: %d critical, %d high, %d medium, %d low.\n",
		countOf(len(r.Images), "image"), countOf(len(r.Containers), "container"), n[imageapi.Critical], n[imageapi.High], n[imageapi.Medium], n[imageapi.Low])
}

type sarifText struct {
	Text string `json:"text"`
}

type sarifRule struct {
	ID    string    `json:"id"`
	Short sarifText `json:"shortDescription"`
}

type sarifArtifact struct {
	URI string `json:"uri"`
}

type sarifPhysical struct {
	Artifact sarifArtifact `json:"artifactLocation"`
}

type sarifLogical struct {
	Name string `json:"fullyQualifiedName"`
	Kind string `json:"kind"`
}

type sarifLocation struct {
	Physical sarifPhysical  `json:"physicalLocation"`
	Logical  []sarifLogical `json:"logicalLocations"`
}

type sarifResult struct {
	RuleID     string            `json:"ruleId"`
	Level      string            `json:"level"`
	Message    sarifText         `json:"message"`
	Locations  []sarifLocation   `json:"locations"`
	Properties map[string]string `json:"properties"`
}

// writeSARIF writes the findings as SARIF 2.1.0.
func (a *app) writeSARIF(r imageapi.AuditReport) error {
	rules := []sarifRule{}
	for id, text := range r.Rules {
		rules = append(rules, sarifRule{id, sarifText{text}})
	}
	slices.SortFunc(rules, func(a, b sarifRule) int { return strings.Compare(a.ID, b.ID) })
	results := []sarifResult{}
	for _, f := range r.Findings {
		level := map[string]string{imageapi.Low: "note", imageapi.Medium: "warning"}[f.Severity]
		if level == "" {
			level = "error"
		}
		at := f.Kind + "/" + f.Subject
		if strings.HasPrefix(f.Where, "/") {
			at += f.Where
		}
		uri := strings.ReplaceAll((&url.URL{Path: at}).EscapedPath(), ":", "%3A")
		results = append(results, sarifResult{
			RuleID: f.Rule, Level: level, Message: sarifText{f.Message + ". Fix: " + f.Fix},
			Locations:  []sarifLocation{{sarifPhysical{sarifArtifact{uri}}, []sarifLogical{{f.Kind + " " + f.Subject + " " + f.Where, "resource"}}}},
			Properties: map[string]string{"severity": f.Severity},
		})
	}
	b, err := json.MarshalIndent(map[string]any{
		"$schema": "https://json.schemastore.org/sarif-2.1.0.json", "version": "2.1.0",
		"runs": []any{map[string]any{
			"tool":    map[string]any{"driver": map[string]any{"name": "tenon audit", "version": a.version, "rules": rules}},
			"results": results,
		}},
	}, "", "  ")
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(a.out, string(b))
	return err
}

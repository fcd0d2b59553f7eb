package packages

import (
	"encoding/json"
	"fmt"
	"net/url"
	"strings"
	"time"
)

// SPDXPredicate is the type of the attestation that carries an SPDX document.
const SPDXPredicate = "https://spdx.dev/Document"

type spdxDocument struct {
	SPDXID            string        `json:"SPDXID"`
	SPDXVersion       string        `json:"spdxVersion"`
	DataLicense       string        `json:"dataLicense"`
	Name              string        `json:"name"`
	DocumentNamespace string        `json:"documentNamespace"`
	CreationInfo      spdxCreation  `json:"creationInfo"`
	Packages          []spdxPackage `json:"packages"`
	Relationships     []spdxRel     `json:"relationships,omitempty"`
}

type spdxCreation struct {
	Created  string   `json:"created"`
	Creators []string `json:"creators"`
}

type spdxPackage struct {
	SPDXID           string    `json:"SPDXID"`
	Name             string    `json:"name"`
	VersionInfo      string    `json:"versionInfo,omitempty"`
	DownloadLocation string    `json:"downloadLocation"`
	SourceInfo       string    `json:"sourceInfo,omitempty"`
	FilesAnalyzed    bool      `json:"filesAnalyzed"`
	ExternalRefs     []spdxRef `json:"externalRefs,omitempty"`
}

type spdxRef struct {
	Category string `json:"referenceCategory"`
	Type     string `json:"referenceType"`
	Locator  string `json:"referenceLocator"`
}

type spdxRel struct {
	Element string `json:"spdxElementId"`
	Type    string `json:"relationshipType"`
	Related string `json:"relatedSpdxElement"`
}

// SPDX writes a list as an SPDX 2.3 document, the same for the same input. id makes
// the document's namespace unique; distribution is the one of package URLs ("debian").
func SPDX(name, id, distribution string, created time.Time, list []Package) ([]byte, error) {
	d := spdxDocument{
		SPDXID: "SPDXRef-DOCUMENT", SPDXVersion: "SPDX-2.3", DataLicense: "CC0-1.0", Name: name,
		DocumentNamespace: "urn:tenon:sbom:" + url.PathEscape(id),
		CreationInfo:      spdxCreation{Created: created.UTC().Format(time.RFC3339), Creators: []string{"Tool: tenon"}},
		Packages:          []spdxPackage{},
	}
	for i, p := range list {
		sp := spdxPackage{SPDXID: fmt.Sprintf("SPDXRef-Package-%d", i+1), Name: p.Name, VersionInfo: p.Version, DownloadLocation: "NOASSERTION"}
		if p.Source != "" {
			sp.SourceInfo = "built from the source package " + p.Source
		}
		purl := fmt.Sprintf("pkg:%s/%s/%s@%s", p.Kind, distribution, url.PathEscape(p.Name), url.PathEscape(p.Version))
		if p.Arch != "" {
			purl += "?arch=" + url.QueryEscape(p.Arch)
		}
		sp.ExternalRefs = []spdxRef{{"PACKAGE-MANAGER", "purl", purl}}
		d.Packages = append(d.Packages, sp)
		d.Relationships = append(d.Relationships, spdxRel{d.SPDXID, "DESCRIBES", sp.SPDXID})
	}
	return json.Marshal(d)
}

// ParseSPDX reads the packages of an SPDX document in JSON. Those that have no
// package URL of a distribution are left out: they are no installed packages.
func ParseSPDX(b []byte) ([]Package, error) {
	var d spdxDocument
	if err := json.Unmarshal(b, &d); err != nil {
		return nil, err
	}
	var out []Package
	for _, sp := range d.Packages {
		for _, ref := range sp.ExternalRefs {
			kind, rest, ok := strings.Cut(strings.TrimPrefix(ref.Locator, "pkg:"), "/")
			if ref.Type != "purl" || !ok || sp.Name == "" {
				continue
			}
			_, query, _ := strings.Cut(rest, "?")
			q, _ := url.ParseQuery(query) // what is no query has no architecture
			p := Package{Name: clean(sp.Name), Version: clean(sp.VersionInfo), Arch: clean(q.Get("arch")), Kind: clean(kind)}
			p.Source = clean(strings.TrimPrefix(sp.SourceInfo, "built from the source package "))
			if strings.Contains(p.Source, " ") {
				p.Source = ""
			}
			out = append(out, p)
			break
		}
		if len(out) >= maxPackages {
			break
		}
	}
	return out, nil
}
